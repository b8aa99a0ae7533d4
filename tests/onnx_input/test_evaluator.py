"""The evaluator that checks are made with, against ONNX Runtime: convolutions and pooling of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.onnx_input.models import model, node, tensor, weight
from tncompile.runtime.evaluator import evaluator


def _several(data: st.DataObject, count: int, low: int, high: int) -> list[int]:
    return data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "MaxPool"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows_of_every_kind(operator: str, data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    sizes, kernel = _several(data, axes, 6, 10), _several(data, axes, 1, 3)
    options: dict[str, Any] = {"kernel_shape": kernel}
    if data.draw(st.booleans()):
        options["strides"] = _several(data, axes, 1, 3)
    padding = data.draw(st.sampled_from(["none", "numbers", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    assume(operator != "ConvTranspose" or not padding.startswith("SAME"))  # onnx's own, which has not all of them
    if padding == "numbers":
        options["pads"] = [data.draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    elif padding != "none":
        options["auto_pad"] = padding
    if not padding.startswith("SAME") and data.draw(st.booleans()):
        options["dilations"] = _several(data, axes, 1, 2)
    weights = []
    if operator != "MaxPool":
        options["group"] = groups = data.draw(st.sampled_from([1, 2]))
        shape = (6, 4 // groups) if operator == "Conv" else (4, 6 // groups)
        weights = [weight("w", *shape, *kernel), *([weight("b", 6)] if data.draw(st.booleans()) else [])]
    inputs = " ".join(["x", *(w.name for w in weights)])
    proto = model([node(operator, inputs, "y", **options)], [tensor("x", [2, 4, *sizes])], [tensor("y", None)], weights)
    x = np.random.default_rng(0).standard_normal((2, 4, *sizes)).astype(np.float32)
    silent = ort.SessionOptions()
    silent.log_severity_level = 4
    try:
        (theirs,) = ort.InferenceSession(proto.SerializeToString(), silent).run(None, {"x": x})
    except Exception:  # a kernel larger than what is left of the image
        assume(False)
    (ours,) = evaluator(proto).run(None, {"x": x})
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
