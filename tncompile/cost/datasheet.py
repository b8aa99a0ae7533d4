"""A device profile from the few figures of a datasheet, for devices that nobody has measured yet."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from tncompile.cost.profile import DeviceProfile
from tncompile.cost.table import Table

_SIZES = tuple(4**k for k in range(7))


def from_datasheet(device: str, flops: float, bandwidth: float, launch: float, tile: int) -> DeviceProfile:
    """A roofline as a profile.

    `flops` and `bandwidth` are the highest rates, per second and in bytes per second; `launch` is what a kernel
    costs at least, in seconds; a product is computed in square tiles of `tile`, whole ones.
    """

    def table(rank: int, work: Callable[..., float], touched: Callable[..., float]) -> Table:
        axes = (_SIZES,) * rank
        times = (launch + max(work(*p) / flops, 4.0 * touched(*p) / bandwidth) for p in product(*axes))
        return Table(axes, tuple(times))

    def whole(size: int) -> int:
        return -(-size // tile) * tile

    def nothing(*sizes: int) -> float:
        return 0.0

    def moving(passes: int, gather: int) -> Callable[[int, int], float]:
        """Blocks of less than `gather` elements cost as much as one of so many."""
        return lambda blocks, block: passes * blocks * max(block, gather)

    return DeviceProfile(
        device=device,
        measured=False,
        strip=1,
        node=launch,
        matmul=table(3, lambda m, k, n: 2.0 * whole(m) * k * whole(n), lambda m, k, n: m * k + k * n + m * n),
        batched=table(
            4,
            lambda b, m, k, n: 2.0 * b * whole(m) * k * whole(n),
            lambda b, m, k, n: b * (m * k + k * n + m * n),
        ),
        conv=table(
            4,
            lambda b, c, f, s: 2.0 * whole(b * s) * c * whole(f),
            lambda b, c, f, s: b * s * (c + f) + c * f,
        ),
        swap=table(3, nothing, lambda outer, a, b: 3 * outer * a * b),
        moved=table(2, nothing, moving(2, 4)),
        shuffled=table(2, nothing, moving(2, 8)),
        multiply=table(2, nothing, lambda spans, length: 2 * spans * length),
        reduce=table(3, nothing, lambda outer, summed, inner: outer * summed * inner),
        reduce_last=table(2, nothing, lambda rows, summed: rows * summed),
        copy=table(1, nothing, lambda elements: 2 * elements),
        read=table(1, nothing, lambda size: size / 4),
    )
