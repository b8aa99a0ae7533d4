"""A scheduled program as an ONNX file, with its folded layers written out or as their cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import onnx
import onnx_ir

from tncompile.emit.interface import finish, name_interface
from tncompile.emit.microbatch import MicroBatches
from tncompile.emit.onnxfile import OnnxFile, pack, packed_size
from tncompile.emit.parts import Sparse
from tncompile.emit.program import lowered, named
from tncompile.emit.store import LOAD_LIMIT, affordable, foldable, store_small
from tncompile.errors import TNCompileError
from tncompile.frontend.model import ImportedModel
from tncompile.frontend.onnx.importer import OnnxModel
from tncompile.ir import Program, Switch

BATCHES = "tncompile.batches"
"""The key of the metadata that has the batch sizes at which every way to compute runs once."""

Store = Literal["auto", "cores", "folded"]


@dataclass(frozen=True)
class Storage:
    """How a file holds weights that could be stored as less: sizes in bytes with all of them written out and with none,
    which is an upper bound where this file holds some of them as parts and not others that share a part.

    `cores` are the folded cores that this file holds as their parts, `sparse` the weights that it holds without their
    zeros, and `seconds` the predicted time that ONNX Runtime needs to make them at load; `all_seconds` the same for
    every weight that could be stored so.
    """

    asked: Store
    folded_bytes: int
    cores_bytes: int
    cores: tuple[str, ...]
    sparse: tuple[str, ...]
    seconds: float
    all_seconds: float
    why: str

    @property
    def differs(self) -> bool:
        """Whether there is anything to choose."""
        return self.folded_bytes != self.cores_bytes


@dataclass(frozen=True)
class Written:
    """A file, and how it holds folded layers. `folded` is the file with all layers written out, if not the same;
    `micro_batches` says how large batches are computed in parts, where they are; `sizes` are batch sizes at which every
    way to compute runs once, as they are in the file's metadata too."""

    file: OnnxFile
    storage: Storage
    folded: OnnxFile | None = None
    micro_batches: MicroBatches | None = None
    sizes: tuple[int, ...] = ()

    @property
    def data(self) -> bytes:
        """The whole file in one message. TNCompileError where its weights are in a file of their own."""
        return self.file.data

    def written_out(self, why: str) -> Written:
        """The file with all layers written out; ValueError where it is that already."""
        if self.folded is None:
            raise ValueError("all layers are written out")
        storage = replace(self.storage, cores=(), sparse=(), seconds=0.0, why=why)
        return replace(self, file=self.folded, storage=storage, folded=None)


def write(
    program: Program,
    traced: ImportedModel,
    store: Store = "auto",
    external_data: bool = False,
    micro_batch: Callable[[onnx_ir.Model], MicroBatches | None] | None = None,
) -> Written:
    """The ONNX file of a scheduled program.

    `store`: ``"folded"`` writes all weights out, ``"cores"`` keeps what folded layers were made of wherever that is
    smaller, and tables that are nearly all zeros without those, ``"auto"`` does so where it saves enough for what is
    made of them at load, as far as that takes no more than `LOAD_LIMIT` seconds. `external_data`: weights go to a file
    of their own even where one file could hold them. `micro_batch` may have large batches computed in parts.
    VerificationError for a file that is not valid ONNX, TNCompileError for another `store`.
    """
    if store not in get_args(Store):
        raise TNCompileError(f"store is {', '.join(get_args(Store))}; not {store!r}")
    model = lowered(program, traced)
    parts = micro_batch(model) if micro_batch is not None else None
    model = named(model, program, traced)
    sizes = _in_every_range(program, parts)
    if sizes:
        model.metadata_props[BATCHES] = " ".join(map(str, sizes))
    strict = not isinstance(traced, OnnxModel)  # a stranger's shapes need not be those that onnx infers
    folded = file = pack(model, external_data, strict)
    found = foldable(model)
    chosen = {"folded": [], "cores": found, "auto": affordable(found)}[store]
    if chosen:
        store_small(model, chosen)
        file = pack(model, external_data, strict)
    rest = [c for c in found if c not in chosen]
    if rest:
        store_small(model, rest)
    smallest = packed_size(model, external_data) if rest else file.size
    storage = Storage(
        store,
        folded.size,
        smallest,
        tuple(c.name for c in chosen if not isinstance(c, Sparse)),
        tuple(c.name for c in chosen if isinstance(c, Sparse)),
        math.fsum(c.seconds for c in chosen),
        math.fsum(c.seconds for c in found),
        _why(store, len(found), len(chosen)),
    )
    return Written(file, storage, folded if chosen else None, parts, sizes)


def adopt(exported: bytes, traced: ImportedModel) -> Written:
    """The file that torch's exporter made of the traced model, or the original, with the model's own names and the
    program's text."""
    model = onnx_ir.from_proto(onnx.load_model_from_string(exported))
    original = isinstance(traced, OnnxModel)
    if not original:
        name_interface(model, traced.program, traced)
    file = pack(finish(model, traced.program, traced), strict=not original)
    why = "it is the original file" if original else "torch's exporter wrote the file"
    return Written(file, Storage("folded", file.size, file.size, (), (), 0.0, 0.0, why))


def _in_every_range(program: Program, parts: MicroBatches | None) -> tuple[int, ...]:
    """Batch sizes at which every plan of every switch runs once, and the batch whole and in parts."""
    limits = {limit for node in program.nodes if isinstance(node, Switch) for limit in node.limits}
    sizes = {size for limit in limits for size in (limit, limit + 1)}
    return tuple(sorted(sizes | {*(parts.sizes if parts is not None else ())}))


def _why(store: Store, found: int, chosen: int) -> str:
    if not found:
        return "no weight could be stored as less"
    if store != "auto":
        return "as asked"
    if chosen == found:
        return f"smaller, and folding takes under {LOAD_LIMIT} s at load"
    return f"{found - chosen} of {found} would take more time or memory at load than that is worth"
