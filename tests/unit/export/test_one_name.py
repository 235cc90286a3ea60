"""Files whose names are given twice, with functions, and with weights in bodies: read as what they mean, or refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from support.errors import one_line

from stca.errors import SplitError
from stca.export.accept import load_onnx
from stca.export.one_name import lift_weights

W = np.arange(4, dtype=np.float32)


def read(text: str, tmp_path, **weights):
    """The model of this text, as it is read from a file and weights, as it is read from a file."""
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items())
    return loaded(model, tmp_path)


def loaded(model, tmp_path):
    onnx.save(model, tmp_path / "m.onnx")
    return load_onnx(tmp_path / "m.onnx")


def scores(model, **feeds):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {n: np.asarray(x) for n, x in feeds.items()})[0]


HEAD = '<ir_version: 10, opset_import: ["": 20{}]> g (float[4] x, int64[2] i) => (float[{}] y) '
X = np.float32([1, -2, 3, -4])


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("{ v = Neg (x) v = Relu (v) y = Exp (v) }", np.exp(np.maximum(-X, 0))),
        ("{ y = Neg (x) v = Relu (y) y = Exp (v) }", np.exp(np.maximum(-X, 0))),
        ("{ y = Neg (x) x = Neg (y) }", -X),  # nothing reads the second
        ("{ [a] v = Neg (x) [a] r = Relu (v) [a] y = Exp (r) }", np.exp(np.maximum(-X, 0))),
        # Of the index that is called `i` and the floats that are, a Gather reads the index, an Exp the floats.
        ("{ i = Neg (x) j = Exp (i) g = Gather (j, i) y = Pad (g, p) }", np.append(np.exp(-X)[[2, 0]], [0, 0])),
    ],
)
def test_a_name_means_what_was_made_last_or_what_fits(body, wanted, tmp_path):
    model = read(HEAD.format("", 4) + body, tmp_path, p=np.int64([0, 2]))
    np.testing.assert_allclose(scores(model, x=X, i=np.int64([2, 0])), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{ x = Neg (x) y = Exp (x) }", ("node 'y' (Exp) reads 'x'", "another name where the model is exported")),
        ("{ w = Neg (x) y = Mul (w, x) }", ("node 'y' (Mul) reads 'w'", "an input or weight")),
    ],
)
def test_what_may_be_either_is_refused_with_the_node(body, said, tmp_path):
    with one_line(SplitError, *said):
        read(HEAD.format("", 4) + body, tmp_path, w=W)


def test_a_weight_that_is_there_twice_is_one_and_two_that_differ_are_none(tmp_path):
    model = parser.parse_model(HEAD.format("", 4) + "{ y = Add (x, w) }")
    model.graph.initializer.extend(numpy_helper.from_array(W, "w") for _ in range(2))
    assert len(loaded(model, tmp_path).graph.initializer) == 1
    model.graph.initializer.append(numpy_helper.from_array(W + 1, "w"))
    with one_line(SplitError, "'w'", "a name of its own"):
        loaded(model, tmp_path)


def branches(hides: str):
    """If the first of `i` is positive: relu(x) * inner, else relu(x); the branch's weight is called `hides`."""
    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [helper.make_node("Mul", ["r", hides], ["v"]), helper.make_node("Identity", ["v"], ["t"])],
        "then",
        [],
        [value("t", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(W, hides)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["r"], ["e"])], "else", [], [value("e", TensorProto.FLOAT, None)]
    )
    model = parser.parse_model(HEAD.format("", 4) + "{ v = Neg (x) r = Relu (v) f = ReduceMax <keepdims = 0> (i) }")
    model.graph.node.append(helper.make_node("Cast", ["f"], ["c"], to=TensorProto.BOOL))
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=then, else_branch=other))
    model.graph.node.append(helper.make_node("Add", ["z", "w"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(100 * W, "w"))
    return model


@pytest.mark.parametrize("hides", ["inner", "w", "v"])
def test_weights_of_bodies_move_to_the_top_and_hide_nothing(hides, tmp_path):
    model = loaded(branches(hides), tmp_path)
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    assert [len(b.initializer) for b in bodies] == [0, 0]
    assert sorted(t.dims[0] for t in model.graph.initializer) == [4, 4]
    relu = np.maximum(-X, 0)
    for i, wanted in ((0, relu), (1, relu * W)):
        np.testing.assert_array_equal(scores(model, x=X, i=np.int64([i, 0])), wanted + 100 * W)


def test_a_large_constant_is_a_weight(tmp_path):
    model = parser.parse_model(HEAD.format("", 4) + "{ p = Mul (x, half) s = ReduceSum (big) y = Add (p, s) }")
    for name, values in (("half", np.float32(0.5)), ("big", np.ones(1000, np.float32))):
        model.graph.node.insert(0, helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)))
    made = loaded(model, tmp_path)
    assert [t.name for t in made.graph.initializer] == ["big"]
    np.testing.assert_array_equal(scores(made, x=X, i=np.int64([0, 0])), X / 2 + 1000)


FUNCTIONS = {
    "of an attribute": (
        "{ y = mine.Net <slope = 0.5> (x) }",
        '<domain: "mine", opset_import: ["": 20]> Net <slope> (x) => (y) { y = LeakyRelu <alpha: float = @slope> (x) }',
    ),
    "of older operators": (
        "{ z = mine.Net (x) y = Neg (z) }",
        '<domain: "mine", opset_import: ["": 13]> Net (x) => (y) '
        "{ r = ReduceMean <axes = [0], keepdims = 1> (x) y = Sub (x, r) }",
    ),
    "of functions": (
        "{ y = mine.Net (x) }",
        '<domain: "mine", opset_import: ["": 20]> Half (x) => (y) { y = Exp (x) }'
        '<domain: "mine", opset_import: ["": 20, "mine": 1]> Net (x) => (y) { h = mine.Half (x) y = Neg (h) }',
    ),
}
WANTED = {"of an attribute": np.where(X > 0, X, X / 2), "of older operators": X.mean() - X, "of functions": -np.exp(X)}


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("imported", [True, False])
def test_functions_of_a_file_are_put_in_their_place(kind, imported, tmp_path):
    call, function = FUNCTIONS[kind]
    model = read(HEAD.format(', "mine": 1' if imported else "", 4) + call + function, tmp_path)
    assert not model.functions
    np.testing.assert_allclose(scores(model, x=X, i=np.int64([0, 0])), WANTED[kind], rtol=1e-6)


def test_a_function_that_calls_itself_is_named(tmp_path):
    text = HEAD.format(', "mine": 1', 4) + "{ y = mine.Net (x) }"
    text += '<domain: "mine", opset_import: ["mine": 1]> Net (x) => (y) { y = mine.Net (x) }'
    with one_line(SplitError, "mine::Net", "recursive"):
        read(text, tmp_path)


def test_a_constant_without_a_value_is_told_of():
    model = parser.parse_model(HEAD.format("", 4) + "{ y = Neg (x) }")
    model.graph.node.append(helper.make_node("Constant", [], ["c"]))
    lift_weights(model)
    assert [n.op_type for n in model.graph.node] == ["Neg", "Constant"]
