"""How fast a device runs the primitives of a contraction: tables of measured times."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from tncompile.cost.kernels import BLOCK
from tncompile.cost.table import Table
from tncompile.errors import LoadError

VERSION = 1
_BRANCH = 7e-6
_IMAGE = 1.5e-7  # seconds, to begin one image of one group
_NARROW = 2.0  # how many times as slow as large products the products of a few channels are
_IN_BLOCKS, _IN_ROWS = 1.05, 0.55  # shares of the best rate that kernels for images of two dimensions reach
_OTHERS = 4  # arrays of one size that share the caches in a network; tables are of one or two in a loop
_CACHED = 1 << 16


@dataclass(frozen=True)
class DeviceProfile:
    """The constants of the cost model. Times in seconds of one node among others in a session, its overhead
    included; sizes in elements unless said; tables are of float32, whose axes are named here.

    `matmul(m, k, n)` is a matrix by a constant, prepacked one, `batched(batch, m, k, n)` any other product.
    `conv(batch, c, f, space)` is a 1×1 convolution of c channels to f. `swap(outer, a, b)` turns a×b matrices,
    `moved(blocks, block)` changes one axis's place and `shuffled(blocks, block)` more than one, with blocks that
    stay together. `multiply(spans, length)` multiplies or adds with one side broadcast every `length` elements,
    `reduce(outer, summed, inner)` sums over the axis in the middle, `reduce_last(rows, summed)` over the last one,
    which has a kernel of its own. `copy(elements)` copies, `read(bytes)` reads in order: what a core costs at least.
    `node` is a step that does next to nothing, a MatMul and a Reshape.

    Kernels work on strips of `strip` columns: a result of 17 columns costs what one of 2·strip = 32 does.
    """

    device: str
    measured: bool
    strip: int
    node: float
    matmul: Table
    batched: Table
    conv: Table
    swap: Table
    moved: Table
    shuffled: Table
    multiply: Table
    reduce: Table
    reduce_last: Table
    copy: Table
    read: Table

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        return self._hash  # computed once: profiles are keys of caches that are asked 100,000 times a search

    @cached_property
    def flops(self) -> float:
        """The highest rate of any matmul, in FLOPs per second."""
        return max(2.0 * m * k * n / seconds for (m, k, n), seconds in self.matmul.points())

    @cached_property
    def sustained(self) -> float:
        """The rate of large matmuls, in FLOPs per second: the median of those of a million products and more."""
        return statistics.median(2.0 * m * k * n / s for (m, k, n), s in self.matmul.points() if m * k * n >= 1 << 20)

    @cached_property
    def bandwidth(self) -> float:
        """The highest rate at which constants are read, in bytes per second."""
        return max(size / seconds for (size,), seconds in self.read.points())

    @property
    def branch(self) -> float:
        """Seconds for an If between plans; inf on a GPU, where a recorded graph of kernels allows none."""
        return math.inf if self.device.startswith("cuda") else _BRANCH

    @lru_cache(maxsize=_CACHED)  # noqa: B019 - profiles are few and live as long as the process
    def matmul_time(
        self, batch: int, m: int, k: int, n: int, itemsize: int, constant: bool | None = None, left: bool = False
    ) -> float:
        """Seconds for `batch` products of m×k by k×n, each with a B of its own.

        `constant`: B is known at compile time, which helps where it is one matrix (by default, where batch is 1).
        `left`: it is A that is the constant.
        """
        packed = batch == 1 and not left and constant is not False
        width = max(1, itemsize / 4)  # narrower types are computed as float32
        if n > self.strip:
            n = -(-n // self.strip) * self.strip
        if packed:
            seconds = self.matmul(m, k, n)
            inside = self.matmul.covers(m, k, n)
        else:
            seconds = self.batched(batch, m, k, n)
            inside = self.batched.covers(batch, m, k, n)
        if not inside:  # beyond the grid the caches may end before the rate does
            seconds = max(seconds, self.read(4.0 * batch * (m * k + k * n + m * n)))
        return seconds * width + (self.waits(m * (k + n) * width) if packed else 0.0)

    def waits(self, elements: float) -> float:
        """Seconds that elements wait for memory: what a copy of them takes in a network, whose other arrays are in the
        caches too, beyond what it would take if all were there. A matmul waits as long for the rows that it reads and
        those that it writes together, as was measured."""
        best, seconds = self._cached_copy
        return max(0.0, self._copied(elements) - seconds * elements / best) if elements > best else 0.0

    def _copied(self, elements: float) -> float:
        """Seconds to copy elements in a network."""
        return max(self.copy(elements), self.copy(_OTHERS * elements) / _OTHERS)

    @cached_property
    def _cached_copy(self) -> tuple[int, float]:
        """The elements, and seconds, of the copy with the highest rate."""
        return min(((elements, s) for (elements,), s in self.copy.points()), key=lambda point: point[1] / point[0])

    def stream_time(self, elements: int, itemsize: int) -> float:
        """Seconds to read so many elements in order."""
        return self.read(elements * itemsize)

    @lru_cache(maxsize=_CACHED)  # noqa: B019
    def permute_time(
        self, elements: int, block: int, itemsize: int, single: bool = False, swap: tuple[int, int] | None = None
    ) -> float:
        """Seconds for a permute that leaves the innermost `block` elements together.

        `single`: only one axis (or block of neighbours) changes its place; `swap` are then the sizes of the two
        that change places.
        """
        width = max(1, itemsize // 4)
        if single and block == 1:
            a, b = swap or (min(elements, 16), max(1, elements // 16))
            seconds = self.swap(elements // (a * b), a, b) * width
        else:  # wider elements are copied as blocks of narrower ones
            table = self.moved if single else self.shuffled
            seconds = table(elements // block, block * width)
        return max(seconds + self.waits(elements * width), self.copy(elements * width))

    @lru_cache(maxsize=_CACHED)  # noqa: B019
    def conv_time(self, batch: int, channels: int, filters: int, space: int, itemsize: int) -> float:
        """Seconds for a 1×1 convolution of (batch, channels, space) by a constant (filters, channels)."""
        space = -(-space // self.strip) * self.strip  # of an image, columns go by strips even where there are few
        return self.conv(batch, channels, filters, space) * max(1, itemsize / 4)

    @lru_cache(maxsize=_CACHED)  # noqa: B019
    def convolution_time(
        self,
        batch: int,
        groups: int,
        channels: int,
        filters: int,
        taps: int,
        space: int,
        itemsize: int,
        volume: bool = False,
    ) -> float:
        """Seconds for a convolution of (batch, groups·channels, ..) by a constant (groups·filters, channels, taps) that
        leaves `space` places, where images are unfolded.

        With groups ONNX Runtime multiplies image by image, but for channels in whole blocks of `BLOCK`: those it
        keeps side by side and has kernels for, if it is no `volume` of three axes.
        """
        width = max(1, itemsize / 4)
        images = batch * groups
        outputs = images * filters * space
        if groups == 1 or (channels % BLOCK == 0 and filters % BLOCK == 0 and not volume):
            unfolded = self._copied(images * channels * taps * space) if taps > 1 else 0.0
            return self.conv_time(images, channels * taps, filters, space, itemsize) + unfolded * width
        if channels == filters == 1 and groups % BLOCK == 0 and not volume:
            return 4 * self.node + (2 * self._copied(outputs) + outputs * taps / self.sustained) * width
        unfolded = self._copied(images * channels * taps * space)
        products = 2.0 * outputs * channels * taps / self.sustained
        return self.node + images * _IMAGE + (1.5 * unfolded + _NARROW * products) * width

    @lru_cache(maxsize=_CACHED)  # noqa: B019
    def direct_time(self, batch: int, channels: int, filters: int, taps: int, space: int) -> float:
        """Seconds for such a convolution of images that lie as it reads them: fewer channels than a block one after the
        other, more in blocks, as its result does (`turned_time` is for others).

        The rates are those of chains of 1×1 to 5×5 convolutions on the machine of the shipped profile (MLAS's NCHWc
        kernels), relative to its matmuls.
        """
        few = channels < self.strip
        products = 2.0 * batch * space * taps * (channels if few else self._whole(channels)) * self._whole(filters)
        seconds = products / self.sustained / (_IN_ROWS if few else _IN_BLOCKS)
        return self.node + max(seconds, self.read(4.0 * taps * channels * filters))

    def turned_time(self, batch: int, channels: int, space: int) -> float:
        """Seconds to put the channels of images in blocks, or back."""
        return self._copied(batch * self._whole(channels) * space)

    def _whole(self, channels: int) -> int:
        return -(-channels // self.strip) * self.strip

    @lru_cache(maxsize=_CACHED)  # noqa: B019
    def multiply_time(self, spans: int, length: int, itemsize: int) -> float:
        """Seconds for an elementwise product or sum of `spans`·`length` results, one side broadcast each span."""
        elements = spans * length * max(1, itemsize / 4)
        return max(self.multiply(spans, length * max(1, itemsize / 4)), self._copied(elements))

    @lru_cache(maxsize=_CACHED)  # noqa: B019
    def reduce_time(self, outer: int, summed: int, inner: int, itemsize: int) -> float:
        """Seconds to sum (outer, summed, inner) over the middle axis."""
        elements = outer * summed * inner
        seconds = self.reduce_last(outer, summed) if inner == 1 else self.reduce(outer, summed, inner)
        return max(seconds * max(1, itemsize / 4), self.read(elements * itemsize))

    def copy_time(self, elements: int, itemsize: int) -> float:
        """Seconds for a node that copies, as does a Reshape right before an output of the model."""
        return self._copied(elements * itemsize / 4)

    def to_json(self) -> str:
        """As JSON text, a line for each table."""
        data: dict[str, Any] = {"version": VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            data[field.name] = value.to_dict() if isinstance(value, Table) else value
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> DeviceProfile:
        """The profile that `to_json` made. LoadError for damaged text, or one of another version."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"not a device profile: damaged JSON ({error})") from error
        if not isinstance(data, dict) or "version" not in data:
            raise LoadError("not a device profile: no version")
        if data["version"] != VERSION:
            raise LoadError(f"a device profile of version {data['version']}; this tncompile reads {VERSION}")
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in data:
                raise LoadError(f"not a whole device profile: {field.name} is missing")
            value = data[field.name]
            values[field.name] = Table.from_dict(value) if field.type == "Table" else value
        if not isinstance(values["strip"], int) or values["strip"] < 1:
            raise LoadError("not a device profile: strip is no number of columns")
        if not isinstance(values["node"], float) or values["node"] <= 0 or not isinstance(values["device"], str):
            raise LoadError("not a device profile: node or device is no such thing")
        ranks = {"matmul": 3, "batched": 4, "conv": 4, "swap": 3, "reduce": 3, "copy": 1, "read": 1}
        for name, table in values.items():
            if isinstance(table, Table) and len(table.axes) != ranks.get(name, 2):
                raise LoadError(f"not a device profile: {name} has {len(table.axes)} axes")
        return cls(**values)
