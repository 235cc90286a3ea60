"""Graphs that others made: what becomes a bundle all the same, and what is refused with the thing to change."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from support.errors import one_line

from stca.checks.verify import prove
from stca.errors import RequestError, SplitError, said_by_onnxruntime
from stca.export.accept import nominal_sizes, with_ranges
from stca.export.pipeline import split_onnx
from stca.runtime import Request, Session
from stca.specs import TensorSpec

SCOPES = {"history": "user", "item": "target"}


def graph(*, weight=0.0, kind=TensorProto.FLOAT, rows="events", output=TensorProto.FLOAT, ir_version=10):
    """score[t] = item[t] · Σ softmax(history + weight) history, over rows by whatever name."""
    inputs = [
        helper.make_tensor_value_info("history", kind, [rows]),
        helper.make_tensor_value_info("item", TensorProto.FLOAT, ["items"]),
    ]
    nodes = [
        helper.make_node("Cast", ["history"], ["h"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["h", "weight"], ["shifted"]),
        helper.make_node("Where", ["never", "shifted", "h"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["p"], axis=0),
        helper.make_node("Mul", ["p", "h"], ["ph"]),
        helper.make_node("ReduceSum", ["ph", "axes"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "item"], ["product"]),
        helper.make_node("Cast", ["product"], ["score"], to=output),
    ]
    weights = [
        numpy_helper.from_array(np.float32([weight]), "weight"),
        numpy_helper.from_array(np.array([False]), "never"),
        numpy_helper.from_array(np.array([0], np.int64), "axes"),
    ]
    outputs = [helper.make_tensor_value_info("score", output, ["items"])]
    made = helper.make_graph(nodes, "foreign", inputs, outputs, weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=ir_version)


@pytest.fixture
def split(tmp_path):
    def run(model, progress=lambda _: None):
        onnx.save(model, tmp_path / "m.onnx")
        return split_onnx(tmp_path / "m.onnx", SCOPES, tmp_path / "bundle", prove=prove, progress=progress)

    return run


def test_sizes_of_any_name_are_assumed_by_scope_and_said(split):
    steps = []
    bundle = split(graph(), steps.append)
    assert any("assuming events (the history) = 10000, items = 300" in s for s in steps)
    assert bundle.manifest.split["workload"]["N_h"] == 10_000
    history = np.float32([1, 2, 3])
    scores = Session.load(bundle.path).score(Request({"history": history, "item": np.float32([1, 10])}))
    p = np.exp(history) / np.exp(history).sum()
    np.testing.assert_allclose(scores[:, 0], (p * history).sum() * np.array([1, 10]), rtol=1e-6)


@pytest.mark.parametrize("missing", ["user", "target"])
def test_a_side_without_inputs_is_told_before_sizes_are_assumed(missing, tmp_path):
    made = helper.make_graph(
        [helper.make_node("Mul", ["age", "price"], ["score"])],
        "dense",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["bs", 3]) for n in ("age", "price")],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["bs", 3])],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    scope, steps = "user" if missing == "target" else "target", []
    with pytest.raises(SplitError, match=f"no input has scope {missing}, .*--{missing}-inputs"):
        split_onnx(
            tmp_path / "m.onnx",
            {"age": scope, "price": scope},
            tmp_path / "out",
            prove=prove,
            progress=steps.append,
        )
    assert not any("assuming" in s for s in steps)


def test_sizes_without_a_name_and_sizes_both_sides_have():
    made = graph()
    made.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    inputs = (
        TensorSpec("history", "float32", ("history_0",), "user"),
        TensorSpec("item", "float32", ("items",), "target"),
    )
    assert nominal_sizes(made.graph, inputs, {"N_h": 70, "N_t": 5})[1] == {"history.0": 70, "items": 5}
    shared = tuple(TensorSpec(s.name, s.dtype, ("batch",), s.scope) for s in inputs)
    for value in made.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    assert nominal_sizes(made.graph, shared, {})[1] == {"batch": 300}, "a row for each target"
    assert nominal_sizes(made.graph, shared, {"batch": 9}) == ({"batch": 9}, {})


def test_a_mask_of_minus_infinity_is_a_weight_like_any_other(split):
    assert json.loads(json.dumps(split(graph(weight=-np.inf)).manifest.parity))["passed"]


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_other_infinite_weights_are_refused(split, weight):
    with pytest.raises(SplitError, match="weight 'weight' has NaN or infinite values"):
        split(graph(weight=weight))


@pytest.mark.parametrize(("kind", "said"), [(TensorProto.UINT32, "uint32"), (TensorProto.STRING, "string")])
def test_an_input_that_no_request_carries(split, kind, said):
    with pytest.raises(SplitError, match=f"input 'history' is {said}, which requests do not carry; cast in the model"):
        split(graph(kind=kind))


def test_what_no_output_needs_is_not_asked_anything(split):
    made = graph()
    unused = helper.make_node("Gather", ["item", "beyond"], ["nothing"])
    made.graph.node.append(unused)
    made.graph.initializer.append(numpy_helper.from_array(np.int64(10**6), "beyond"))
    assert split(made).manifest.parity["passed"]


def test_scores_that_do_not_depend_on_the_target_under_a_nodes_own_name(split):
    """A pointwise model of one score per row: lifted, it is repeated, by a node of another name than `score`."""
    inputs = [
        helper.make_tensor_value_info("history", TensorProto.FLOAT, ["rows", 3]),
        helper.make_tensor_value_info("item", TensorProto.FLOAT, ["rows"]),
    ]
    nodes = [
        helper.make_node("Mul", ["item", "zero"], ["nothing"], "nothing"),
        helper.make_node("ReduceSum", ["history", "axis"], ["sum"], "sum", keepdims=0),
        helper.make_node("Shape", ["nothing"], ["rows"], "rows"),
        helper.make_node("Expand", ["sum", "rows"], ["score"], "score"),
    ]
    weights = [numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.int64([1]), "axis")]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["rows"])]
    made = helper.make_graph(nodes, "same", inputs, outputs, weights)
    bundle = split(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    request = {"history": np.float32([[1, 2, 3]]), "item": np.float32([5, 7])}
    assert Session.load(bundle.path).score(Request(request)).tolist() == [[6], [6]]


def test_what_is_no_tensor_is_named(split):
    made = graph()
    made.graph.input[1].type.CopyFrom(helper.make_optional_type_proto(made.graph.input[1].type))
    with pytest.raises(SplitError, match="'item' is no tensor of a known type"):
        split(made)


def test_what_draws_at_random_is_named(split):
    made = graph()
    made.graph.node.insert(0, helper.make_node("RandomNormalLike", ["item"], ["noise"], "dropout"))
    made.graph.node.append(helper.make_node("Add", [made.graph.output[0].name, "noise"], ["noisy"], "noisy"))
    made.graph.output[0].name = "noisy"
    with pytest.raises(
        SplitError, match="node 'dropout' \\(RandomNormalLike\\) draws at random; take it out of the model"
    ):
        split(made)


def test_scores_that_are_no_floats(split):
    with pytest.raises(SplitError, match="output 'score' is int64; scores must be floating point"):
        split(graph(output=TensorProto.INT64))


def test_a_file_that_says_it_is_newer_than_onnxruntime_knows(split):
    assert split(graph(ir_version=14)).manifest.parity["passed"]


def test_what_onnxruntime_says_without_where_in_its_source():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="onnxruntime_src") as e:
        onnxruntime.InferenceSession(graph(ir_version=99).SerializeToString(), options)
    assert said_by_onnxruntime(e.value).startswith("Unsupported model IR version: 99")


def test_what_a_model_needs_is_held_at_the_door(split):
    """A softmax over no events is no number, and the bundle says so; its history is `N_h`, whatever it was called."""
    bundle = split(graph())
    assert bundle.manifest.graphs["request"].inputs[0].shape == ("N_h",)
    assert bundle.manifest.min_history is None, "a sum over no events is 0"


@pytest.mark.parametrize("opset", [11, 13])
def test_a_model_of_an_older_operator_set_is_lifted_and_served(opset, tmp_path):
    """Passes add nodes as newer sets have them: an Unsqueeze with axes as an input, a Shape from and to an axis."""
    body = (
        "total = ReduceSum <axes: ints = [1], keepdims: int = 0> (history)"
        if opset < 13
        else "one = Constant <value_ints: ints = [1]> () total = ReduceSum <keepdims: int = 0> (history, one)"
    )
    model = parser.parse_model(
        f"""<ir_version: 7, opset_import: ["": {opset}]>
        old (float[batch, seq, 3] history, float[batch, 3] item) => (float[batch, 6] scores)
        {{ {body} both = Concat <axis: int = 1> (total, item) scores = Tanh (both) }}"""
    )
    onnx.save(model, tmp_path / "old.onnx")
    bundle = split_onnx(tmp_path / "old.onnx", SCOPES, tmp_path / "bundle", prove=prove)
    request = {"history": np.ones((1, 4, 3), np.float32), "item": np.zeros((2, 3), np.float32)}
    scores = Session.load(bundle.path).score(Request(request))
    np.testing.assert_allclose(scores, np.tanh([[4, 4, 4, 0, 0, 0]] * 2), rtol=1e-5)


@pytest.mark.parametrize("opset", [10, 13])
def test_a_table_of_8_bits_below_the_operator_sets_of_the_reference(opset, tmp_path):
    """score = Σ E[history] · E[item], E in uint8, as quantizers wrote it for years."""
    rng = np.random.default_rng(0)
    table, scale, zero = rng.integers(0, 256, (300, 8)).astype(np.uint8), np.float32(0.02), np.uint8(128)
    model = parser.parse_model(
        f"""<ir_version: 7, opset_import: ["": {opset}]>
        g (int64[batch, 6] history, int64[batch] item) => (float[batch] score) {{
            e = DequantizeLinear (table, scale, zero)
            h = Gather (e, history)
            user = ReduceMean <axes = [1], keepdims = 0> (h)
            t = Gather (e, item)
            p = Mul (user, t)
            score = ReduceMean <axes = [1], keepdims = 0> (p)
        }}"""
    )
    weights = {"table": table, "scale": scale, "zero": zero}
    model.graph.initializer.extend(numpy_helper.from_array(w, n) for n, w in weights.items())
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", SCOPES, tmp_path / "bundle", prove=prove)
    rows = (table.astype(np.float64) - 128) * scale
    scores = Session.load(bundle.path).score(Request({"history": [1, 2, 3, 4, 5, 6], "item": [7, 8]}))
    np.testing.assert_allclose(scores[:, 0], (rows[1:7].mean(0) * rows[7:9]).mean(1), rtol=1e-5)
    assert all(p.stat().st_size < table.nbytes for p in bundle.path.glob("*.onnx")), "stored once"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("i = Identity (ids)", "ids: limit=101, but .* for 100 ids, 0 to 99; say limit=100, or give the table 1 more"),
        ("i = Add (ids, one)", "rows for 99 ids, 0 to 98; say limit=99, or give the table 2 more"),
        ("z = Sub (one, one) i = Where (mask, ids, z)", "say limit=100"),
        ("i = Mod (ids, hundred)", None),
        ("i = Clip (ids, , ninety)", None),
        ("a = Less (ids, hundred) b = Not (a) c = Not (b) i = Where (c, ids, one)", None),
    ],
    ids=["itself", "one on", "where a mask says so", "wrapped", "clipped", "guarded"],
)
def test_more_ids_than_the_table_they_are_looked_up_in_has(body, said):
    """The session would fail on the last of them, which no random request of the proof may hold."""
    constants = "one = Constant <value = int64 {1}> () hundred = Constant <value = int64 {100}> ()"
    text = f"{constants} ninety = Constant <value = int64 {{90}}> () {body} y = Gather (table, i)"
    inputs = "int64[n] ids, bool[n] mask, float[100, 4] table"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (float y) {{ {text} }}')
    spec = TensorSpec("ids", "int64", ("n",), "user")
    too_many, few = dataclasses.replace(spec, limit=101), dataclasses.replace(spec, limit=91)
    assert with_ranges(model, [few], {}) == (few,)
    if said is None:
        assert with_ranges(model, [too_many], {}) == with_ranges(model, [spec], {"ids": 101}) == (too_many,)
        return
    with pytest.raises(SplitError, match=said):
        with_ranges(model, [too_many], {})
    with pytest.raises(SplitError, match="--ids ids=101, but"):
        with_ranges(model, [spec], {"ids": 101})


@pytest.mark.parametrize(
    ("guard", "low"),
    [
        ("w = GreaterOrEqual (length, one) i = Where (w, a, zero)", 1),
        ("w = Greater (length, zero) i = Where (w, a, zero)", 1),
        ("w = Less (a, zero) i = Where (w, zero, a)", 0),
    ],
)
def test_a_length_that_the_graph_guards_may_be_that_of_any_history(guard, low, tmp_path):
    """score = item · history[length - 1], a length of 0 sorted out; the longest history that is asked is no limit."""
    numbers = "one = Constant <value = int64 {1}> () zero = Constant <value = int64 {0}> ()"
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[1, N_h, 4] history, int64[1] length, float[N_t, 4] item) => (float[N_t] score) {{
            {numbers} axes = Constant <value = int64[1] {{1}}> () both = Constant <value = int64[2] {{0, 1}}> ()
            a = Sub (length, one) {guard} u = Gather <axis = 1> (history, i) v = Tanh (u) x = Squeeze (v, both)
            p = Mul (x, item) score = ReduceSum <keepdims = 0> (p, axes)
        }}"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {**SCOPES, "length": "user"}, tmp_path / "bundle", prove=prove)
    length = next(s for s in bundle.manifest.graphs["request"].inputs if s.name == "length")
    assert (length.low or 0, length.limit, length.length_of) == (low, None, "N_h")
    session, item = Session.load(bundle.path), np.ones((1, 4), np.float32)
    history = np.arange(40, dtype=np.float32).reshape(1, 10, 4) / 40
    scores = session.score(Request({"history": history, "length": [10], "item": item}))
    np.testing.assert_allclose(scores[0, 0], np.tanh(history[0, 9]).sum(), rtol=1e-5)
    with one_line(RequestError, "length", "11"):
        session.score(Request({"history": history, "length": [11], "item": item}))
