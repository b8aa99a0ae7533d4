"""Models that others wrote, tensorized and dense, as cases to measure tncompile on.

`CASES` has them by name. Nothing is imported before a case is loaded, so that one whose package is missing takes
no other with it. The packages are in requirements.txt and requirements-no-deps.txt beside this file.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SMALL = (1, 16, 256)
#: For convolutional networks on whole images, long windows or sentences, where 256 at once are seconds of work.
LARGE = (1, 8, 32)
TENSORIZED, DENSE = "C", "A"


@dataclass(frozen=True)
class Shipped:
    """The file that a model's authors give out, and the ``--input`` flags for fixed shapes and for a dynamic batch."""

    path: Path
    fixed: tuple[str, ...]
    dynamic: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A module in inference mode, and tensors to call it on.

    Along `batch_axis` the inputs may be repeated and cut to any batch size; None where they have no one axis of it.
    `dynamic` is what ``tncompile.save`` takes as shapes for a dynamic batch. `shipped` is set where users have a file
    rather than Python code.
    """

    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    batch_axis: int | None = 0
    dynamic: Any = "batch"
    shipped: Shipped | None = None

    def at(self, batch: int | None) -> tuple[torch.Tensor, ...]:
        """The inputs at a batch size; None is the one they have."""
        if batch is None or self.batch_axis is None:
            return self.inputs
        return tuple(_repeated(x, self.batch_axis, batch) for x in self.inputs)


@dataclass(frozen=True)
class Case:
    """A model to measure: its group (``"A"`` dense, ``"C"`` tensorized), and the batch sizes it is served at."""

    name: str
    group: str
    make: Callable[[], Loaded]
    batches: tuple[int, ...] = SMALL

    def load(self) -> Loaded:
        """A fresh module with the same weights each time. ModuleNotFoundError where its package is not installed."""
        import random

        import numpy as np
        import torch

        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):  # some libraries print what they build
            loaded = self.make()
        loaded.module.eval().requires_grad_(False)
        return loaded


def _repeated(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    copies = -(-size // x.shape[axis])
    repeats = [copies if a == axis else 1 for a in range(x.ndim)]
    return x.repeat(repeats).narrow(axis, 0, size).contiguous()


def _make(module: str, function: str, options: Mapping[str, Any]) -> Loaded:
    result = getattr(import_module(f"benchmarks.models.{module}"), function)(**options)
    assert isinstance(result, Loaded)
    return result


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(
        name: str, group: str, where: str, batches: tuple[int, ...] = SMALL, options: Mapping[str, Any] | None = None
    ) -> None:
        module, function = where.split(".")
        cases[name] = Case(name, group, partial(_make, module, function, options or {}), batches)

    forms = (("recon", "reconstructed"), ("facto", "factorized"))
    for form in ("cp", "tucker", "blocktt"):
        for short, implementation in forms:
            options = {"form": form, "implementation": implementation}
            add(f"tl_linear_{form}_{short}", TENSORIZED, "tensorly_torch.linear", options=options)
    for form in ("cp", "tucker", "tt"):
        for short, implementation in forms:
            options = {"form": form, "implementation": implementation}
            add(f"tl_conv_{form}_{short}", TENSORIZED, "tensorly_torch.convolution", options=options)
    for form in ("cp", "tucker", "blocktt"):
        add(f"tl_embedding_{form}", TENSORIZED, "tensorly_torch.embedding", options={"form": form})
    for form in ("cp", "tucker", "tt"):
        add(f"tl_trl_{form}", TENSORIZED, "tensorly_torch.regression_cnn", options={"form": form})
    add("tl_tcl_cnn", TENSORIZED, "tensorly_torch.contraction_cnn")
    add("tl_mlp_blocktt_chain", TENSORIZED, "tensorly_torch.block_tt_mlp")
    add("tl_minilm_ffn_blocktt", TENSORIZED, "sentences.tensorized_layer", LARGE)
    for short, module, network in (("tr", "tensor_ring", "TR"), ("tk2", "tucker2", "TK2"), ("cp", "cp", "CP")):
        options = {"module": module, "network": f"{network}LeNet5"}
        add(f"ted_{short}_lenet5", TENSORIZED, "tednet_models.lenet5", options=options)
    add("ted_tt_resnet20", TENSORIZED, "tednet_models.resnet20", LARGE)
    add("ted_tr_lstm", TENSORIZED, "tednet_models.ring_lstm")
    add("ted_tk2_lstm", TENSORIZED, "tednet_models.tucker_lstm")
    add("tk_mpslayer_digits", TENSORIZED, "networks.tensorkrowch_mps")
    add("einconv_lenet", TENSORIZED, "networks.einconv_lenet")
    add("ts_monarch_mlp", TENSORIZED, "networks.monarch_mlp")
    add("quimb_mps_classifier", TENSORIZED, "networks.quimb_mps")
    add("neuralop_tfno", TENSORIZED, "networks.fourier_operator", LARGE)
    adapters: dict[str, Mapping[str, Any]] = {
        "lokr": {"adapter": "LoKrConfig", "r": 8, "init_weights": False},
        "dora": {"adapter": "LoraConfig", "r": 8, "use_dora": True, "init_lora_weights": False},
    }
    for kind, given in adapters.items():
        add(f"peft_{kind}_minilm", TENSORIZED, "sentences.encoder", LARGE, given)
    add("minilm_l6", DENSE, "sentences.encoder", LARGE)
    add("efficientnet_lite0", DENSE, "pretrained.efficientnet_lite0", LARGE)
    add("crepe_tiny", DENSE, "pretrained.crepe", LARGE, {"size": "tiny"})
    add("crepe_full", DENSE, "pretrained.crepe", LARGE, {"size": "full"})
    add("silero_vad_jit", DENSE, "pretrained.silero_torchscript")
    add("silero_vad_16k", DENSE, "pretrained.silero_step")
    add("mtcnn_pnet", DENSE, "pretrained.mtcnn_proposals", LARGE)
    add("ccexam_mnist", DENSE, "pretrained.ccexam_digits")
    return cases


#: Every case, by name.
CASES: Mapping[str, Case] = MappingProxyType(_cases())
