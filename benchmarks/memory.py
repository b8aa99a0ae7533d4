"""Peak memory of a compile, beside the model's size: ``python -m benchmarks.memory --gigabytes 2.5``.

A model of dense layers, one in four a tensor train, with an embedding of a fifth of its size, is compiled by the
command line in a process of its own. Limit: the model's size and one and a half of its largest network, on top of what
a process has that compiled a model of a few kilobytes. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from tncompile.frontend.trace import whole_einsums

# VmHWM, not getrusage: that would count what the parent had when it started this process
_CHILD = """
import sys
from pathlib import Path
from tncompile.cli import main
code = main(sys.argv[1:])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
raise SystemExit(code)
"""


class TensorTrain(nn.Module):
    """A square linear layer in the TT-matrix format."""

    def __init__(self, modes: tuple[int, int], rank: int) -> None:
        super().__init__()
        a, b = modes
        self.modes = modes
        self.first = nn.Parameter(torch.randn(a, a, rank) / (a * rank) ** 0.5)
        self.second = nn.Parameter(torch.randn(rank, b, b) / b**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., a·b] -> [..., a·b]``."""
        y = torch.einsum("...ab,acr,rbd->...cd", x.reshape(*x.shape[:-1], *self.modes), self.first, self.second)
        return y.reshape(x.shape)


class Large(nn.Module):
    """An embedding and `layers` layers of `width`, every fourth a tensor train."""

    def __init__(self, width: int, layers: int, rows: int) -> None:
        super().__init__()
        modes = (width // 64, 64)
        self.embedding = nn.Embedding(rows, width)
        self.layers = nn.ModuleList(
            TensorTrain(modes, 8) if k % 4 == 3 else nn.Linear(width, width) for k in range(layers)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens] -> [batch, width]``."""
        x: torch.Tensor = self.embedding(tokens).mean(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def save(path: Path, gigabytes: float, width: int) -> tuple[int, int]:
    """Save such a model; the bytes of its weights and of its largest one."""
    layers = max(4, round(0.8 * gigabytes * 1e9 / (3 * width * width)))  # 4 bytes, three of four
    with torch.no_grad():
        model = Large(width, layers, max(8, int(0.2 * gigabytes * 1e9 / (4 * width)))).eval()
    sizes = [p.nbytes for p in model.parameters()]
    batch = torch.export.Dim("batch")
    tokens = torch.randint(0, 8, (2, 4))
    with whole_einsums():
        torch.export.save(torch.export.export(model, (tokens,), dynamic_shapes=({0: batch},)), path)
    return sum(sizes), max(sizes)


def peak(model: Path, output: Path, *options: str) -> tuple[int, float]:
    """Peak of resident memory, in bytes, and the seconds of a compile with its check."""
    command = [sys.executable, "-c", _CHILD, str(model), "-o", str(output), "-q", *options]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or f"compile ended with {done.returncode}")
    return int(done.stdout.split()[-1]) * 1024, time.perf_counter() - start


def main() -> None:
    """Measure and print; exit 1 where the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, metavar="N", help="size of the model (default 0.5)")
    parser.add_argument("--width", type=int, default=4096, metavar="N", help="of its layers (default 4096)")
    parser.add_argument("--folder", metavar="PATH", help="where the files go, three times the model's size")
    parser.add_argument("--json", action="store_true", help="print JSON and not Markdown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, output = Path(folder, "model.pt"), Path(folder, "model.onnx")
        save(model, 0, 256)
        base, _ = peak(model, output)
        size, largest = save(model, options.gigabytes, options.width)
        found, seconds = peak(model, output, "--external-data")
        written = sum(os.path.getsize(p) for p in Path(folder).glob("model.onnx*"))
    limit = size + 1.5 * largest
    record = {
        "model": size,
        "largest": largest,
        "written": written,
        "base": base,
        "peak": found,
        "of the model": found - base,
        "limit": limit,
        "within": found - base <= limit,
        "seconds": seconds,
    }
    if options.json:
        print(json.dumps(record))
    else:
        print("| model GB | largest weight GB | written GB | base GB | peak GB | peak - base GB | limit GB | seconds |")
        print("|--:|--:|--:|--:|--:|--:|--:|--:|")
        sizes = (size, largest, written, base, found, found - base, limit)
        print("| " + " | ".join(f"{n / 1e9:.2f}" for n in sizes) + f" | {seconds:.0f} |")
    raise SystemExit(not record["within"])


if __name__ == "__main__":
    main()
