"""Tables that a graph reads by sizes alone, however many axes they have and whichever is cut."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from stca.export.analysis.positions import position_tables

HEAD = '<ir_version: 10, opset_import: ["": 20]> g (float[1, N_h, 4] x, int64[1, N_h] ids) => (float[N, M] y)'
SIZE = "n = Shape<start=1, end=2>(x)"


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ((2000, 8), f"{SIZE} y = Slice(table, none, n, none)"),
        ((1, 2000, 8), f"{SIZE} y = Slice(table, none, n, one)"),
        ((4, 2000), f"{SIZE} y = Slice(table, none, n, one)"),
        ((1, 2000, 8), f"{SIZE} s = Squeeze(n) places = Range(zero, s, step) y = Gather<axis=1>(table, places)"),
        (None, "y = Gather(table, ids)"),
    ],
)
def test_tables_of_positions(shape: tuple[int, ...] | None, body: str) -> None:
    model = parser.parse_model(f"{HEAD} {{ {body} }}")
    weights = {
        "table": np.zeros(shape or (2000, 8), np.float32),
        "none": np.int64([0]), "one": np.int64([1]), "zero": np.int64(0), "step": np.int64(1),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for n, x in weights.items())
    assert position_tables(model) == ({"table": shape} if shape else {})
