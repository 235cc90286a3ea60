"""Which places a graph reads by their number, whatever stands there."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from stca.export.analysis.last_place import read_at_last

HEAD = '<ir_version: 10, opset_import: ["": 20]> g (float[1, 9, 4] x) => (float[1, 4] y)'


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Gather<axis=1>(x, last)", {9}),
        ("y = Gather<axis=1>(x, eight)", {9}),
        ("y = Gather<axis=1>(x, zero)", set()),
        ("a = Gather<axis=1>(x, zero) b = Gather<axis=1>(x, eight) y = Add(a, b)", set()),
        ("a = Slice(x, lasts, ends, ones) y = Squeeze(a, ones)", {9}),
        ("a = Slice(x, zeros, ends, ones) y = ReduceSum<keepdims=0>(a, ones)", set()),
        ("t = Transpose<perm=[1, 0, 2]>(x) all, h = GRU<hidden_size=4>(t, w, r) y = Squeeze(h, zeros)", set()),
        ("t = Transpose<perm=[1, 0, 2]>(x) _, h = GRU<hidden_size=4>(t, w, r) y = Squeeze(h, zeros)", {9}),
    ],
)
def test_the_last_place(body: str, found: set[int]) -> None:
    model = parser.parse_model(f"{HEAD} {{ {body.replace('_,', ',')} }}")
    weights = {
        "last": np.int64(-1), "eight": np.int64(8), "zero": np.int64(0), "lasts": np.int64([-1]),
        "zeros": np.int64([0]), "ends": np.int64([1 << 62]), "ones": np.int64([1]),
        "w": np.zeros((1, 12, 4), np.float32), "r": np.zeros((1, 12, 4), np.float32),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for n, x in weights.items())
    assert read_at_last(model) == found
