"""A batch that an exporter baked in: told apart from a history with as many events as there are targets."""

from __future__ import annotations

import onnx
import pytest
from support.errors import one_line

from stca.errors import SplitError
from stca.export.one_batch import with_one_batch
from stca.specs import TensorSpec

INPUTS = TensorSpec("user", "float32", (4, 3), "user"), TensorSpec("item", "float32", (4, 3), "target")


def model(mixed: str) -> onnx.ModelProto:
    """Scores of 4 targets by what `mixed` makes of `rows [4, 3]`, through a reshape that takes no other size."""
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        baked (float[4, 3] user, float[4, 3] item) => (float[4] scores) {{
            flat = Constant <value_ints = [12]> ()
            back = Constant <value_ints = [4, 3]> ()
            last = Constant <value_ints = [1]> ()
            first = Constant <value_ints = [0]> ()
            line = Reshape (user, flat)
            rows = Reshape (line, back)
            used = {mixed}
            both = Mul (used, item)
            scores = ReduceSum <keepdims = 0> (both, last)
        }}
    """)


def test_a_baked_batch_is_refused() -> None:
    with one_line(SplitError, "4 rows", "dynamic_shapes", "dynamic_axes"):
        with_one_batch(model("Identity (rows)"), INPUTS, lambda _: None)


@pytest.mark.parametrize("mixed", ["ReduceMean <keepdims = 1> (rows, first)", "ReduceMax <keepdims = 1> (rows, first)"])
def test_as_many_events_as_targets_are_none(mixed: str) -> None:
    assert with_one_batch(model(mixed), INPUTS, lambda _: None) == INPUTS
