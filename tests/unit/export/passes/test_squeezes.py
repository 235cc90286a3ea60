"""`x.squeeze()` keeps the rows of a batch of one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from stca.export.passes.squeezes import name_squeezed_axes
from stca.specs import TensorSpec

X = TensorSpec("x", "float32", ("B", 1, "L", 1), "user")
SPECS = (X, TensorSpec("i", "int64", ("B",), "target"))


def model(body: str, opset: int = 20) -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> g (float[B, 1, L, 1] x, int64[B] i) => (float[A, C] y) '
        f"{{ {body} }}"
    )


@pytest.mark.parametrize("opset", [11, 13, 20])
@pytest.mark.parametrize("body", ["y = Squeeze(x)", "a = Neg(x) b = Squeeze(a) y = Neg(b)"])
def test_only_axes_that_are_always_one_go(opset: int, body: str) -> None:
    made = model(body, opset)
    name_squeezed_axes(made, SPECS)
    onnx.checker.check_model(made, full_check=True)
    for rows, events in ((3, 4), (1, 4), (3, 1), (1, 1)):
        feeds = {"x": np.ones((rows, 1, events, 1), np.float32), "i": np.zeros(rows, np.int64)}
        assert ReferenceEvaluator(made).run(None, feeds)[0].shape == (rows, events)


def test_axes_that_are_said_stay_and_so_does_what_cannot_run() -> None:
    said = "axis = Constant <value_ints: ints = [1]> () y = Squeeze(x, axis)"
    fails = "two = Constant <value_ints: ints = [2]> () a = Reshape(x, two) y = Squeeze(a)"
    for body in (said, fails):
        made, before = model(body), model(body)
        name_squeezed_axes(made, SPECS)
        assert made == before
