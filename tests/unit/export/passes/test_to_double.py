"""The float64 twin of an ONNX model: nothing in it may still round to float32, and nothing else may change."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from support import tiny

from stca import probe
from stca.export.passes.to_double import in_double, to_double
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.reference.module import request_inputs


def run(model, **feeds):
    return ReferenceEvaluator(model).run(None, feeds)


def parsed(text, **weights):
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items())
    return model


THIRD = np.float32(1) / np.float32(3)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("g (double[n] x) => (double[n] y) { y = Div (x, w) }", {"w": np.float32(3)}),
        ("g (double[n] x) => (double[n] y) { c = Constant <value_float = 3.0> () y = Div (x, c) }", {}),
        ("g (double[n] x) => (double[n] y) { c = Constant <value = float {3.0}> () y = Div (x, c) }", {}),
        ("g (double[n] x) => (double[n] y) { c = Cast <to = 1> (x) y = Div (c, w) }", {"w": np.float32(3)}),
        ("g (double[n] x) => (double[n] y) { c = Cast <to = 10> (x) y = Div (c, w) }", {"w": np.float16(3)}),
        ("g (double[n] x) => (double[n] y) { c = CastLike (x, w) y = Div (c, w) }", {"w": np.float32(3)}),
        (
            "g (double[n] x) => (double[n] y) { s = Shape (x) c = ConstantOfShape <value = float[1] {3.0}> (s) "
            "y = Div (x, c) }",
            {},
        ),
        (
            "g (double[n] x) => (double[n] y) { y = If (t) <then_branch = a () => (float[n] p) "
            "{ c = Cast <to = 1> (x) p = Div (c, w) }, else_branch = b () => (float[n] q) { q = Identity (x) }> }",
            {"w": np.float32(3), "t": np.array(True)},
        ),
        (
            "g (double[n] x) => (double[n] y) { y = Loop (k, t, x) <body = b (int64 i, bool go, float[n] a) => "
            "(bool on, float[n] z) { on = Identity (go) z = Div (a, w) }> }",
            {"w": np.float32(3), "t": np.array(True), "k": np.int64(1)},
        ),
    ],
    ids=["weight", "value_float", "constant", "cast", "half", "castlike", "constant of shape", "if", "loop"],
)
def test_rounds_nowhere(text, weights):
    model = parsed(text.replace("double[n] x", "float[n] x").replace("double[n] y", "float[n] y"), **weights)
    before = model.SerializeToString()
    x = np.array([1.0, 1 + 2.0**-40])
    (y,) = run(to_double(model), x=x)
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, x / 3)
    assert model.SerializeToString() == before


def test_zeros_of_a_shape_are_float64_too():
    model = parsed(
        "g (float[n] x) => (float[n] y) { size = Shape (x) zeros = ConstantOfShape (size) y = Add (x, zeros) }"
    )
    (found,) = in_double(model)({"x": np.float32([1, 2])})
    assert found.dtype == np.float64


def test_random_and_float_constants_in_lists():
    model = parsed("g (float[n] x) => (float[2] y) { c = Constant <value_floats = [3.0, 7.0]> () y = Div (x, c) }")
    (y,) = run(to_double(model), x=np.array([1.0, 1.0]))
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, [1 / 3, 1 / 7])


def test_functions_and_layer_norm():
    function = parser.parse_function(
        '<domain: "f", opset_import: ["" : 18]> Third (x) => (y) { c = Constant <value = float {3.0}> () '
        "c1 = Cast <to = 1> (c) y = Div (x, c1) }"
    )
    body = helper.make_graph(
        [
            helper.make_node("Third", ["x"], ["a"], domain="f"),
            helper.make_node("LayerNormalization", ["a", "w"], ["y"], stash_type=1, epsilon=0.5),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, "n"])],
        [numpy_helper.from_array(np.ones(3, np.float32), "w")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    model = helper.make_model(body, functions=[function], opset_imports=imports, ir_version=10)
    x = np.random.default_rng(0).standard_normal((2, 3))
    (y,) = run(to_double(model), x=x)
    a = x / 3
    centred = a - a.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 0.5)
    np.testing.assert_allclose(y, expected, rtol=1e-14)


def test_integers_stay():
    model = parsed("g (int64[n] i) => (float[n] y) { y = Gather (w, i) }", w=np.arange(5, dtype=np.float32) * THIRD)
    wide = to_double(model)
    assert wide.graph.input[0].type.tensor_type.elem_type == TensorProto.INT64
    (y,) = run(wide, i=np.array([4, 1]))
    np.testing.assert_array_equal(y, np.float64(THIRD * np.float32([4, 1])))


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_of_the_exported_model_is_the_module_in_float64(exported, checkpoint_file, form):
    """Two implementations that share no code: torch in float64, and ONNX's reference on the widened graph.

    ONNX holds the attention's scale and the norms' epsilon in float32; a value computed in float32 would show at 1e-7.
    """
    graph = onnx.load(exported("log", form) / "request.onnx")
    module = load_checkpoint(checkpoint_file("log")).build(form).double()
    specs = request_inputs(tiny.config())
    rng = np.random.default_rng(0)
    feeds = probe.pack(specs, [probe.single(specs, n, m, rng) for n, m in ((6, 3), (0, 2), (3, 1))])
    (got,) = run(to_double(graph), **feeds)
    with torch.no_grad():
        expected = module({n: torch.from_numpy(x) for n, x in feeds.items()}).numpy()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=2e-8, atol=0)
