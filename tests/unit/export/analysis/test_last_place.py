"""Which places a graph reads by their number, whatever stands there."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from stca.export.analysis.last_place import read_at_last

HEAD = '<ir_version: 10, opset_import: ["": 20, "com.example": 1]> g (%s) => (float[1, 4] y)'
X = {("x", 1)}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Gather<axis=1>(x, last)", X),
        ("y = Gather<axis=1>(x, eight)", X),
        ("y = Gather<axis=1>(x, zero)", set()),
        ("a = Gather<axis=1>(x, zero) b = Gather<axis=1>(x, eight) y = Add(a, b)", set()),
        ("a = Slice(x, lasts, ends, ones) y = Squeeze(a, ones)", X),
        ("a = Slice(x, lasts, before, ones, lasts) y = ReduceSum<keepdims=0>(a, ones)", set()),
        ("a = Slice(x, lasts, ends, ones, ones) y = Squeeze(a, ones)", X),
        ("a = Slice(x, zeros, ends, ones) y = ReduceSum<keepdims=0>(a, ones)", set()),
        ("a = com.example.Odd(x) y = Gather<axis=-2>(a, last)", set()),
        ("y = Gather<axis=-2>(x, last)", X),
        ("t = Transpose<perm=[1, 0, 2]>(x) all, h = GRU<hidden_size=4>(t, w, r) y = Squeeze(h, zeros)", set()),
        ("t = Transpose<perm=[1, 0, 2]>(x) _, h = GRU<hidden_size=4>(t, w, r) y = Squeeze(h, zeros)", X),
    ],
)
def test_the_last_place(body: str, found: set[tuple[str, int]]) -> None:
    assert of("float[1, 9, 4] x", body) == found


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("e = Gather(table, ids) y = Gather<axis=1>(e, last)", {("ids", 1)}),
        ("e = Gather(table, ids) y = Gather<axis=2>(e, last)", set()),
        ("e = Gather(table, ids) h = MatMul(e, square) n = LayerNormalization(h, scale) y = Gather<axis=1>(n, last)",
         {("ids", 1)}),
        ("e = Gather(table, ids) h = MatMul(e, square) n = LayerNormalization(h, scale) y = Gather<axis=2>(n, last)",
         set()),
        ("e = Gather(table, ids) t = Transpose<perm=[0, 2, 1]>(e) p = MatMul(e, t) soft = Softmax(p) "
         "m = MatMul(soft, e) y = Gather<axis=1>(m, last)", {("ids", 1)}),
        ("e = Gather(table, ids) f = Reshape(e, flat) g = Gemm<transB=1>(f, square) parted = Reshape(g, split) "
         "a = Add(parted, e) y = Gather<axis=1>(a, last)", {("ids", 1)}),
        ("e = Gather(table, ids) f = Reshape(e, flat) g = MatMul(f, square) parted = Reshape(g, split) "
         "y = Gather<axis=2>(parted, last)", set()),
        ("e = Gather(table, ids) both = Concat<axis=0>(e, e) one, two = Split<axis=0, num_outputs=2>(both) "
         "y = Gather<axis=2>(two, last)", set()),
        ("c = com.example.Odd(ids) e = Gather(table, c) parted = Reshape(e, split) y = Gather<axis=1>(parted, last)",
         {("ids", 1)}),
        ("y = Gather<axis=1>(vector, last)", {("vector", 1)}),
        ("y = Gather<axis=1>(target, last)", {("target", 1)}),
    ],
)  # fmt: skip
def test_what_lies_along_an_axis_as_long_as_the_history(body: str, found: set[tuple[str, int]]) -> None:
    """Rows of the table are as wide as the history is long, and a vector of the user's and the target are too."""
    assert of("int64[1, 9] ids, float[1, 9] vector, float[N_t, 9] target", body) == found


def of(inputs: str, body: str) -> frozenset[tuple[str, int]]:
    model = parser.parse_model(f"{HEAD % inputs} {{ {body.replace('_,', ',')} }}")
    weights = {
        "last": np.int64(-1), "eight": np.int64(8), "zero": np.int64(0), "lasts": np.int64([-1]),
        "zeros": np.int64([0]), "ends": np.int64([1 << 62]), "before": np.int64([-(1 << 62)]), "ones": np.int64([1]),
        "flat": np.int64([9, 9]), "split": np.int64([1, 9, 9]), "scale": np.ones(9, np.float32),
        "w": np.zeros((1, 12, 4), np.float32), "r": np.zeros((1, 12, 4), np.float32),
        "table": np.zeros((200, 9), np.float32), "square": np.zeros((9, 9), np.float32),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x), n) for n, x in weights.items())
    return read_at_last(model)
