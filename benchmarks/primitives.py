"""How fast ONNX Runtime runs the primitives that the cost model knows, beside what the model says.

    python -m benchmarks.primitives

Prints one line a primitive: measured and predicted microseconds. `tncompile.cost.profile.CPU` was fitted to
such a run; a large ratio on another machine says that its plans may not be the best ones there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import onnx_ir as onnx

from tncompile.cost.profile import CPU
from tncompile.ir import Array
from tncompile.runtime.session import Session
from tncompile.runtime.timing import race

MATMULS = [
    (1, 1, 768, 512),
    (1, 1, 1024, 1024),
    (1, 32, 768, 512),
    (1, 256, 768, 512),
    (1, 4096, 8, 64),
    (1, 4096, 64, 8),
    (1, 512, 512, 8),
    (1, 32768, 4, 4),
    (8, 64, 64, 12),
    (256, 64, 64, 12),
    (256, 16, 16, 64),
    (2048, 8, 8, 16),
]
PERMUTES = [
    ((256, 64, 64), (0, 2, 1)),
    ((256, 8, 64), (0, 2, 1)),
    ((256, 8, 8, 12), (0, 2, 1, 3)),
    ((256, 8, 8, 96), (0, 2, 1, 3)),
    ((64, 256, 512), (1, 0, 2)),
]


def session(
    op: str, shape: Sequence[int], constant: Array | None = None, first: bool = False, **attributes: object
) -> Session:
    """A model of one node on an input x; a constant stands behind it, or before it where `first`."""
    x = onnx.Value(name="x", type=onnx.TensorType(onnx.DataType.FLOAT), shape=onnx.Shape(shape))
    inputs, initializers = [x], []
    if constant is not None:
        weight = onnx.Value(name="w", const_value=onnx.tensor(constant, name="w"))
        initializers = [weight]
        inputs = [weight, x] if first else [x, weight]
    node = onnx.node(op, inputs, attributes=attributes)  # type: ignore[arg-type]
    node.outputs[0].name = "y"
    node.outputs[0].type = x.type
    graph = onnx.Graph([x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 20})
    return Session(onnx.to_proto(onnx.Model(graph, ir_version=10)).SerializeToString())


def primitives() -> Iterator[tuple[str, Session, Array, float]]:
    """Label, session, input and predicted seconds of each primitive."""
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> Array:
        return generator.standard_normal(shape).astype(np.float32)

    for batch, m, k, n in MATMULS:
        predicted = CPU.matmul_time(batch, m, k, n, 4)
        if batch == 1:
            yield f"MatMul {m}x{k} by core {k}x{n}", session("MatMul", (m, k), numbers(k, n)), numbers(m, k), predicted
        else:
            label = f"MatMul core {m}x{k} by {batch} of {k}x{n}"
            yield label, session("MatMul", (batch, k, n), numbers(m, k), first=True), numbers(batch, k, n), predicted
    for shape, perm in PERMUTES:
        tail = 0
        while perm[-1 - tail] == len(perm) - 1 - tail:
            tail += 1
        block = int(np.prod(shape[len(shape) - tail :])) if tail else 8
        predicted = CPU.permute_time(int(np.prod(shape)), block, 4)
        yield f"Transpose {shape} by {perm}", session("Transpose", shape, perm=perm), numbers(*shape), predicted


def main() -> None:
    """Measure and print."""
    items = list(primitives())
    calls = {label: partial(s.run, {"x": x}) for label, s, x, _ in items}
    nothing = partial(session("Identity", (1, 1)).run, {"x": np.zeros((1, 1), np.float32)})
    times = race({**calls, "nothing": nothing}, rounds=20)
    call = times.median("nothing")
    print(f"{'primitive':44s} {'measured':>9s} {'predicted':>9s}  µs, less {call * 1e3:.1f} µs for a call")
    for label, _, _, predicted in items:
        print(f"{label:44s} {max(times.median(label) - call, 0.0) * 1e3:9.1f} {predicted * 1e6:9.1f}")


if __name__ == "__main__":
    main()
