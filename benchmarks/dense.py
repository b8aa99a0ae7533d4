"""Dense image models of timm, in which no layer is tensorized, compiled and raced with torch's own export.

    pip install timm
    python -m benchmarks.dense --threads 1 --write docs/performance.md

What the compiler is not made for must not become slower by it. Weights are random; images of 160x160, or of the size
that a network is made for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import race
from benchmarks.models.packages import torchvision
from tncompile.errors import TNCompileError


@dataclass(frozen=True)
class Network:
    """A network of timm."""

    key: str
    task: str
    side: int = 160
    sizes: Mapping[str, int] = field(default_factory=dict)

    def file(self, folder: Path) -> Path:
        """The network as an exported program with a dynamic batch. TNCompileError without timm."""
        target = folder / f"{self.key}.pt2"
        if target.is_file():
            return target
        try:
            torchvision()
            import timm
        except ImportError as error:
            raise TNCompileError(f"timm is not there ({error}): pip install timm") from error
        torch.manual_seed(0)
        model = timm.create_model(self.key, pretrained=False).eval()
        image = torch.randn(2, 3, self.side, self.side)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},))
        torch.export.save(program, target)
        return target


_CONVOLUTIONS, _GATES, _ATTENTION = "convolutions", "convolutions and gates", "attention"
NETWORKS = (
    Network("resnet18", _CONVOLUTIONS),
    Network("densenet121", _CONVOLUTIONS),
    Network("regnetx_002", _CONVOLUTIONS),
    Network("repvgg_a0", _CONVOLUTIONS),
    Network("mobileone_s0", "branches"),
    Network("convnext_atto", "convolutions and norms"),
    Network("mobilenetv3_small_100", _GATES),
    Network("efficientnet_b0", _GATES),
    Network("ghostnet_100", _GATES),
    Network("hardcorenas_a", _GATES),
    Network("mixnet_s", _GATES),
    Network("rexnet_100", _GATES),
    Network("skresnet18", _GATES),
    Network("resnest14d", _GATES),
    Network("edgenext_xx_small", _ATTENTION),
    Network("efficientvit_b0", _ATTENTION),
    Network("mobilevitv2_050", _ATTENTION),
    Network("levit_128s", _ATTENTION, 224),
    Network("vit_tiny_patch16_224", _ATTENTION, 224),
    Network("cait_xxs24_224", _ATTENTION, 224),
    Network("mixer_s32_224", "dense layers", 224),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where something is refused or a network fails."""
    return race.main("dense", NETWORKS, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
