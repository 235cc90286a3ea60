"""What is shown to keep tokens apart, and what is not: never more than is true, and all that models are made of."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from stca.bundle import Bundle
from stca.export.analysis.tokenwise import Tokenwise

# y of x (N_h, 4), ids (N_h) and of weights w (4, 4), v (4), k (1, 4); `i` is a table (9, 4), `u` comes once per user.
SHOWN = (
    "y = Relu (x)",
    "y = MatMul (x, w)",
    "y = MatMul (x, v)",
    "y = Gemm (x, w, v)",
    "y = Gemm <transB: int = 1> (x, w)",
    "y = Add (x, v)",
    "y = Add (k, x)",
    "a = Sigmoid (x) y = Mul (x, a)",
    "y = Gather (i, ids)",
    "o = Constant <value: tensor = int64[1] {1}> () a = Unsqueeze (ids, o) y = GatherND (i, a)",
    "o = Constant <value: tensor = int64[2] {1, 3}> () y = Gather <axis: int = 1> (x, o)",
    "y = Softmax <axis: int = -1> (x)",
    "y = LayerNormalization <axis: int = -1> (x, v, v)",
    "y = BatchNormalization (x, v, v, v, v)",
    "o = Constant <value: tensor = int64[1] {-1}> () y = ReduceSum (x, o)",
    "y = ArgMax <axis: int = 1> (x)",
    "o = Constant <value: tensor = int64[1] {1}> () y = Unsqueeze (x, o)",
    "o = Constant <value: tensor = int64[2] {1, -1}> () y = Unsqueeze (x, o)",
    "o = Constant <value: tensor = int64[1] {1}> () a = Unsqueeze (x, o) y = Squeeze (a, o)",
    "s = Constant <value: tensor = int64[3] {-1, 2, 2}> () y = Reshape (x, s)",
    "n = Shape <start: int = 0, end: int = 1> (x) t = Constant <value: tensor = int64[2] {2, 2}> () "
    "s = Concat <axis: int = 0> (n, t) y = Reshape (x, s)",
    "o = Constant <value: tensor = int64[1] {1}> () a = Unsqueeze (x, o) y = Transpose <perm: ints = [0, 2, 1]> (a)",
    "y = Concat <axis: int = 1> (x, x)",
    "y, z = Split <axis: int = 1, num_outputs: int = 2> (x)",
    "b = Constant <value: tensor = int64[1] {1}> () e = Constant <value: tensor = int64[1] {3}> () "
    "y = Slice (x, b, e, b)",
    "y = Einsum <equation: string = 'nd,dc->nc'> (x, w)",
    "y = Einsum <equation: string = 'nd,nd->n'> (x, x)",
    "z = Constant <value: tensor = float {0}> () s = Shape (x) a = Expand (z, s) y = Add (x, a)",
    "s = Shape (x) y = ConstantOfShape (s)",
    "z = Constant <value: tensor = float {0}> () c = Greater (x, z) a = CastLike (z, x) y = Where (c, x, a)",
    "a = Transpose <perm: ints = [1, 0]> (x) y = Transpose (a)",
    "a = Transpose (x) b = MatMul (w, a) y = Transpose (b)",
    "a = Transpose (x) b = Softmax <axis: int = 0> (a) y = Transpose (b)",
    "o = Constant <value: tensor = int64[1] {0}> () a = Unsqueeze (x, o) b = MatMul (a, w) y = Squeeze (b, o)",
    "s = Constant <value: tensor = int64[3] {1, -1, 4}> () o = Constant <value: tensor = int64[1] {0}> () "
    "a = Reshape (x, s) b = Add (a, k) y = Squeeze (b, o)",
    "a = Einsum <equation: string = 'nd,dc->cn'> (x, w) y = Einsum <equation: string = 'cn,nd->nc'> (a, x)",
    "a = Transpose (x) b = Gemm <transA: int = 1> (a, w, v) y = Relu (b)",
    "a = Transpose (x) b = MatMul (v, a) y = Identity (b)",
)
NOT_SHOWN = (
    "a = Transpose <perm: ints = [1, 0]> (x) y = MatMul (x, a)",
    "a = Transpose <perm: ints = [1, 0]> (x) y = Softmax <axis: int = 1> (a)",
    "y = MatMul (q, x)",
    "y = Softmax <axis: int = 0> (x)",
    "y = Softmax <axis: int = -2> (x)",
    "y = LayerNormalization <axis: int = 0> (x, q, q)",
    "y = ReduceMean <keepdims: int = 1> (x)",
    "o = Constant <value: tensor = int64[1] {-2}> () y = ReduceMax (x, o)",
    "o = Constant <value: tensor = int64 {0}> () y = CumSum (x, o)",
    "o = Constant <value: tensor = int64[1] {0}> () y = Gather (x, o)",
    "y = Gather (x, ids)",
    "y = ArgMax (x)",
    "o = Constant <value: tensor = int64[1] {0}> () y = Unsqueeze (x, o)",
    "o = Constant <value: tensor = int64[2] {2, -4}> () y = Unsqueeze (x, o)",
    "s = Constant <value: tensor = int64[2] {-1, 2}> () y = Reshape (x, s)",
    "s = Constant <value: tensor = int64[2] {4, -1}> () y = Reshape (x, s)",
    "y = Concat <axis: int = 0> (x, x)",
    "y = Concat <axis: int = -2> (x, x)",
    "b = Constant <value: tensor = int64[1] {1}> () e = Constant <value: tensor = int64[1] {9}> () y = Slice (x, b, e)",
    "y = Flatten <axis: int = 0> (x)",
    "y = Einsum <equation: string = 'nd,md->nm'> (x, x)",
    "y = Einsum <equation: string = 'nd,nd->d'> (x, x)",
    "y = Einsum <equation: string = 'nd,cn->c'> (x, q)",
    "y = Add (x, u)",
    "y = Add (x, q)",  # (3, 4): fits a history of three alone
    "a = Cast <to: int = 1> (ids) y = Add (a, x)",  # along the columns, when there are four tokens
    "n = Shape (ids) o = Constant <value: tensor = int64 {0}> () s = Squeeze (n) "
    "p = Constant <value: tensor = int64 {1}> () r = Range (o, s, p) y = Add (ids, r)",
    "n = Shape (ids) y = Add (ids, n)",
)


def model_of(body: str) -> onnx.ModelProto:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N_h, 4] x, int64[N_h] ids, float[B, 4] u) => (y) '
        f"{{ {body} }}".replace("'", '"')
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 4)), ("v", (4,)), ("k", (1, 4)), ("i", (9, 4)), ("q", (3, 4))):
        model.graph.initializer.append(numpy_helper.from_array(rng.random(shape).astype(np.float32), name))
    return model


@pytest.mark.parametrize("body", SHOWN)
def test_what_is_shown_is_true(body):
    """And checked: every part of the rows has the same values by itself."""
    model = model_of(body)
    shown = Tokenwise(model, {"x": 0, "ids": 0})
    assert "y" in shown.rows, shown.why_not.get("y")
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((7, 4)).astype(np.float32), "ids": rng.integers(0, 9, 7)}
    evaluator = ReferenceEvaluator(model)
    whole = evaluator.run(["y"], feeds)[0]
    for rows in (slice(0, 1), slice(1, 4), slice(4, 7), slice(0, 0)):
        part = evaluator.run(["y"], {n: x[rows] for n, x in feeds.items()})[0]
        np.testing.assert_allclose(part, whole[rows], rtol=1e-6, atol=1e-6)


# y is a sum over all tokens; beside it, sums that more than tokens went into, or that are none.
SUMS = (
    "o = Constant <value: tensor = int64[1] {0}> () y = ReduceSum (x, o)",
    "o = Constant <value: tensor = int64[2] {0, 1}> () a = Mul (x, x) y = ReduceSum (a, o)",
    "s = MatMul (x, w) a = Softmax <axis: int = -1> (s) b = Transpose (a) y = MatMul (b, x)",
    "a = Transpose (x) b = MatMul (w, a) c = Softmax <axis: int = 0> (b) y = MatMul (c, x)",
    "y = Gemm <transA: int = 1> (x, x)",
    "y = Einsum <equation: string = 'nd,nd->d'> (x, x)",
    "y = Einsum <equation: string = 'nd,nc->dc'> (x, x)",
)
NO_SUMS = (
    "y = Gemm <transA: int = 1> (x, x, w)",
    "y = Einsum <equation: string = 'nd,md->d'> (x, x)",
    "o = Constant <value: tensor = int64[1] {1}> () y = ReduceSum (x, o)",
    "o = Constant <value: tensor = int64[1] {0}> () y = ReduceMean (x, o)",
    "o = Constant <value: tensor = int64[1] {0}> () y = ReduceMax (x, o)",
    "a = Softmax <axis: int = 0> (x) b = Transpose (a) y = MatMul (b, x)",
    "o = Constant <value: tensor = int64[1] {0}> () a = ReduceSum (x, o) y = Add (a, v)",
    "a = Transpose (x) y = MatMul (a, u)",
    "y = MatMul (x, w)",
    "s = Shape (x) z = Constant <value: tensor = int64 {0}> () n = Gather (s, z) c = Cast <to: int = 1> (n) "
    "y = Einsum <equation: string = 'nd,->d'> (x, c)",
)


def sums_of(body: str) -> set[str]:
    return Tokenwise(model_of(body), {"x": 0, "ids": 0}).sums


@pytest.mark.parametrize("body", SUMS)
def test_a_sum_is_that_of_its_parts(body):
    assert "y" in sums_of(body)
    evaluator = ReferenceEvaluator(model_of(body))
    rng = np.random.default_rng(1)
    x, ids = rng.standard_normal((7, 4)).astype(np.float32), np.zeros(7, np.int64)
    whole, first, rest = (evaluator.run(["y"], {"x": x[rows], "ids": ids[rows]})[0] for rows in PARTS)
    np.testing.assert_allclose(first + rest, whole, rtol=1e-5, atol=1e-5)


PARTS = slice(0, 7), slice(0, 3), slice(3, 7)


@pytest.mark.parametrize("body", NO_SUMS)
def test_what_is_no_sum_is_not_taken_for_one(body):
    assert "y" not in sums_of(body)


@pytest.mark.parametrize("body", NOT_SHOWN)
def test_what_is_not_known_is_not_shown(body):
    shown = Tokenwise(model_of(body), {"x": 0, "ids": 0})
    assert "y" not in shown.rows
    assert "y" in shown.why_not.keys() | shown.sizes | shown.axes.keys()


def test_the_first_obstacle_is_named():
    shown = Tokenwise(model_of("a = Relu (x) b = CumSum (a, zero) c = Relu (b) y = Add (c, u)"), {"x": 0, "ids": 0})
    assert shown.why_not["b"] == "value 'zero'"
    body = "o = Constant <value: tensor = int64 {0}> () b = CumSum (x, o) c = Relu (b) y = Add (c, x)"
    assert (
        Tokenwise(model_of(body), {"x": 0}).why_not["y"] == "node 'b' (CumSum), which is not known to keep tokens apart"
    )
    assert Tokenwise(model_of("y = Add (x, u)"), {"x": 0}).why_not["y"] == "input 'u', which has no row per token"


@pytest.mark.parametrize("export", [("log", "absorbed"), ("log", "projected"), ("delta", "projected")], ids="-".join)
def test_the_reference_model_is_shown(exported, export):
    bundle = Bundle.load(exported(*export))
    tokens = {s.name: 0 for s in bundle.manifest.graphs["user_encoder"].inputs if s.shape == ("N_h",)}
    shown = Tokenwise(onnx.load(bundle.file("user_encoder")), tokens)
    per_token = {s.name for s in bundle.manifest.state if s.shape[:1] == ("N_h",)}
    assert per_token
    assert per_token <= shown.rows
    assert bundle.manifest.appendable
