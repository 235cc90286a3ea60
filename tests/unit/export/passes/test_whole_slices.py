"""Slices that take all there is are dropped, and no others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from stca.export.passes.whole_slices import drop_whole_slices

END = 9223372036854775807


def dropped(body: str) -> list[str]:
    """Operators that are left of a graph, which gives what it gave."""
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[A, B] x) => (float[C, D] y) {{ {body} }}'
    )
    wanted = ReferenceEvaluator(model).run(None, {"x": np.arange(12, dtype=np.float32).reshape(3, 4)})[0]
    drop_whole_slices(model)
    onnx.checker.check_model(model, full_check=True)
    found = ReferenceEvaluator(model).run(None, {"x": np.arange(12, dtype=np.float32).reshape(3, 4)})[0]
    np.testing.assert_array_equal(found, wanted)
    return [n.op_type for n in model.graph.node if n.op_type not in ("Constant", "Cast")]


def test_slices_of_everything_are_dropped_one_after_the_other() -> None:
    body = f"""zero = Constant <value_ints: ints = [0]> () end = Constant <value_ints: ints = [{END}]> ()
               a = Slice (x, zero, end) as_int = Cast <to: int = 7> (zero) b = Slice (a, as_int, end, zero)
               y = Neg (b)"""
    assert dropped(body) == ["Neg"]


def test_one_that_makes_an_output_stays() -> None:
    body = f"""zero = Constant <value_ints: ints = [0]> () end = Constant <value_ints: ints = [{END}]> ()
               y = Slice (x, zero, end)"""
    assert dropped(body) == ["Slice"]


@pytest.mark.parametrize(("start", "end", "step"), [(1, END, 1), (0, 2, 1), (0, -1, 1), (0, END, 2)])
def test_others_stay(start: int, end: int, step: int) -> None:
    body = f"""start = Constant <value_ints: ints = [{start}]> () end = Constant <value_ints: ints = [{end}]> ()
               step = Constant <value_ints: ints = [{step}]> () zero = Constant <value_ints: ints = [0]> ()
               a = Slice (x, start, end, zero, step) y = Neg (a)"""
    assert dropped(body) == ["Slice", "Neg"]
