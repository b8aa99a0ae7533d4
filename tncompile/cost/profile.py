"""The constants of the cost model: how fast a device runs matmuls, moves data and starts nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceProfile:
    """A roofline with a launch term. Times in seconds, rates per second, sizes in elements unless said.

    A matmul of m×k by k×n runs at ``flops · m/(m+half_m) · k/(k+half_k) · n/(n+half_n)``: each `half_*` is
    the size at which that mode alone halves the rate. A permute is read and written at a rate that grows
    with its innermost unmoved block, from `permute` (none) towards `bandwidth`.
    """

    name: str
    flops: float
    half_m: float
    half_k: float
    half_n: float
    bandwidth: float
    node: float
    matmul: float
    permute: float
    permute_half: float
    branch: float

    def matmul_time(self, batch: int, m: int, k: int, n: int, itemsize: int) -> float:
        """Seconds for `batch` products of m×k by k×n."""
        rate = self.flops * m / (m + self.half_m) * k / (k + self.half_k) * n / (n + self.half_n)
        moved = batch * (m * k + k * n + m * n) * itemsize
        return self.node + max(2.0 * batch * m * k * n / rate, moved / self.bandwidth) + batch * self.matmul

    def stream_time(self, elements: int, itemsize: int) -> float:
        """Seconds to read or write so many elements in order."""
        return elements * itemsize / self.bandwidth

    def permute_time(self, elements: int, block: int, itemsize: int) -> float:
        """Seconds for a permute that leaves the innermost `block` elements together."""
        share = (block - 1) / (block - 1 + self.permute_half)
        rate = self.permute + share * (self.bandwidth - self.permute)
        return self.node + 2.0 * elements * itemsize / rate


CPU = DeviceProfile(
    name="cpu",  # two cores with AVX2; fitted to benchmarks/primitives.py
    flops=190e9,
    half_m=2.0,
    half_k=4.0,
    half_n=10.0,
    bandwidth=50e9,
    node=1.5e-6,  # with the Reshape that mostly comes along
    matmul=0.08e-6,
    permute=2.5e9,
    permute_half=24.0,
    branch=5e-6,
)
