"""The operator in standard operators for one request per run: the same scores, and nothing an engine cannot parse."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from support.errors import one_line

from stca import probe
from stca.bundle import Bundle
from stca.errors import ExportError
from stca.export.analysis.integers import fold_integers
from stca.export.analysis.scope import walk
from stca.export.passes import lower
from stca.export.passes.lower import for_one_request
from stca.plugins import onnx_function
from stca.plugins.reference import target_history_attention as reference

FORMS = ("fused", "decomposed")


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("time", "attention"), [("log", "absorbed"), ("log", "projected"), ("delta", "projected")])
def test_scores_stay(exported, form, time, attention, rng):
    bundle = Bundle.load(exported(time, attention))
    specs = bundle.manifest.graphs["request"].inputs
    own = [onnx.load(bundle.file(half)) for half in ("user_encoder", "target_scorer")]
    lowered = [for_one_request(model, form) for model in own]
    for model in lowered:
        onnx.checker.check_model(model, full_check=True)
        assert not model.functions
        assert not [n for n in walk(model.graph.node) if n.domain or n.op_type in ("Loop", "If", "Scan")]
    for tokens in (0, 1, 17):
        feeds = probe.pack(specs, [probe.single(specs, tokens, 5, rng)])
        true = run(own[1], {**feeds, **run(own[0], feeds)})
        if tokens == 0:  # as an engine gets an empty history: one token of zeros that the offsets leave out
            given = {
                n: np.zeros(1, x.dtype) if n.startswith("history_") and not len(x) else x for n, x in feeds.items()
            }
        else:
            given = feeds
        found = run(lowered[1], {**given, **run(lowered[0], given)})
        np.testing.assert_allclose(found["scores"], true["scores"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_one_request_is_fixed_and_nothing_idle_is_left(bundle_dir, form):
    model = for_one_request(onnx.load(Bundle.load(bundle_dir).file("target_scorer")), form)
    sizes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert sizes["request_device"] == [1]
    assert sizes["state_history_offsets"] == [2]
    assert "target_offsets" not in sizes  # whose targets they are needs no looking up
    assert not {"CumSum", "ScatterElements"} & {node.op_type for node in model.graph.node}
    assert sizes["target_item"] == ["N_t"]
    used = {name for node in model.graph.node for name in node.input}
    assert {i.name for i in model.graph.input} | {t.name for t in model.graph.initializer} <= used
    assert sum(n.op_type == "Attention" for n in model.graph.node) == (2 if form == "fused" else 0)


def attention_model(lengths: str) -> onnx.ModelProto:
    """One operator whose history_lengths are `lengths`: an input, the segments' own, or those less one."""
    text = """<ir_version: 10, opset_import: ["" : 18, "stca" : 1]>
    g (float[N_t, 4, 8] q, float[N_h, 2, 8] k, float[N_h, 2, 8] v, int32[B_plus_1] t, int32[B_plus_1] h, int32[B] given)
      => (float[N_t, 4, 8] out, int32[B] also)
    {
        also = Identity (given)
        zero = Constant <value: tensor = int64[1] {0}> ()
        one = Constant <value: tensor = int64[1] {1}> ()
        minus = Constant <value: tensor = int64[1] {-1}> ()
        end = Constant <value: tensor = int64[1] {9223372036854775807}> ()
        a = Slice (h, one, end, zero)
        b = Slice (h, zero, minus, zero)
        differences = Sub (a, b)
        small = Constant <value: tensor = int32[1] {1}> ()
        shorter = Sub (differences, small)
        out = stca.TargetHistoryAttention <scale: float = 0.3> (q, k, v, t, h, LENGTHS)
    }"""
    model = parser.parse_model(text.replace("LENGTHS", lengths))
    for operator in model.graph.node:
        if operator.domain and lower.is_operator(operator):
            operator.input[1:3] = ["k4", "v4"]
    repeat = [
        helper.make_node("Concat", [name, name], [f"{name}4"], axis=1) for name in ("k", "v")
    ]  # the operator wants as many key heads as query heads
    nodes = [*repeat, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx_function.attach(model)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("lengths", "used"), [("given", 3), ("given", 0), ("shorter", 4), ("differences", 5)])
def test_tokens_beyond_the_length_are_not_looked_at(form, lengths, used, rng):
    model = attention_model(lengths)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((6, 4, 8), (5, 2, 8), (5, 2, 8)))
    offsets = np.array([0, 5], np.int32)
    feeds = {"q": q, "k": k, "v": v, "t": np.array([0, 6], np.int32), "h": offsets, "given": np.array([3], np.int32)}
    if lengths == "given":
        feeds["given"] = np.array([used], np.int32)
    out = run(for_one_request(model, form), feeds)["out"]
    wide = [np.concatenate([x, x], axis=1) for x in (k, v)]
    true = reference(q, *wide, feeds["t"], offsets, np.array([used], np.int32), scale=0.3)
    np.testing.assert_allclose(out, true, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("lengths", "whole"), [("differences", True), ("shorter", False), ("given", False)])
def test_whole_segments_are_shown_not_believed(lengths, whole):
    model = attention_model(lengths)
    operator = next(n for n in model.graph.node if lower.is_operator(n))
    assert lower.uses_all_tokens(model, operator) is whole


@pytest.mark.parametrize(
    ("index", "source"),
    [
        ("Range (zero, count, one)", "t"),  # a row for each target
        ("Range (one, count, one)", None),  # one row less
        ("Identity (ids)", "ids"),
        ("Concat <axis: int = 0> (ids, ids)", None),
    ],
)
def test_the_only_row_is_taken_for_each_row_of_an_input(index, source, rng):
    """Where the index has as many rows as an input, what computed it is gone. Its values never count."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[B, 3] x, int64[N_t] t, int64[n] ids) => (float[rows, 3] y, int64[N_t] also, int64[n] other)
        {
            also = Identity (t)
            other = Identity (ids)
            zero = Constant <value: tensor = int64 {0}> ()
            one = Constant <value: tensor = int64 {1}> ()
            shape = Shape (t)
            count = Squeeze (shape)
            index = INDEX
            y = Gather (x, index)
        }""".replace("INDEX", index)
    )
    lowered = for_one_request(model, "decomposed")
    kinds = {node.op_type for node in lowered.graph.node}
    assert ("Mul" in kinds) == (source is None)
    assert ("ConstantOfShape" in kinds) == (source is not None)
    x = rng.standard_normal((1, 3)).astype(np.float32)
    for n in (1, 4):
        feeds = {"x": x, "t": np.zeros(n, np.int64), "ids": np.full(n + 2, 7)}
        rows = {"t": n, "ids": n + 2}.get(source, n - 1 if "Range" in index else 2 * n + 4)
        assert np.array_equal(run(lowered, feeds)["y"], np.repeat(x, rows, axis=0))


def test_an_operator_over_lists_of_segments_is_refused():
    names = ["q", "k", "v", "t", "h", "l", "segments", "bias"]
    node = helper.make_node("TargetHistoryAttention", names, ["x"], "joined", domain="stca", scale=1.0)
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("stca", 1)])
    with one_line(ExportError, "joined", "several segments", "--lowering plugin"):
        for_one_request(model, "decomposed")


def test_an_operator_inside_a_body_is_refused():
    inner = helper.make_node(
        "TargetHistoryAttention", ["q", "k", "v", "t", "h", "l"], ["x"], "deep", domain="stca", scale=1.0
    )
    info = helper.make_tensor_value_info
    body = helper.make_graph([inner], "body", [], [info("x", TensorProto.FLOAT, None)])
    branch = helper.make_node("If", ["c"], ["out"], then_branch=body, else_branch=body)
    graph = helper.make_graph([branch], "g", [info("c", TensorProto.BOOL, [])], [info("out", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("stca", 1)])
    with one_line(ExportError, "deep", "control-flow"):
        for_one_request(model, "fused")


def test_integers_are_folded_and_weights_are_not():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (float[n, 3] x) => (float[m, n] y, float[1, 3] z)
        <float[3] w = {1, 2, 3}>
        {
            axis = Constant <value: tensor = int64 {-1}> ()
            one = Constant <value: tensor = int64[1] {-1}> ()
            axes = Reshape (axis, one)
            sum = ReduceSum (x, axes)
            y = Transpose <perm: ints = [1, 0]> (sum)
            zero = Constant <value: tensor = int64[1] {0}> ()
            z = Unsqueeze (w, zero)
        }"""
    )
    fold_integers(model)
    assert [n.op_type for n in model.graph.node] == ["ReduceSum", "Transpose", "Unsqueeze"]
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert constants["axes"].tolist() == [-1]
    assert constants["w"].tolist() == [1, 2, 3]
    assert run(model, {"x": np.ones((2, 3), np.float32)})["y"].tolist() == [[3, 3]]


def test_integers_outside_the_model_are_not_known():
    """A table of buckets among the weights: its type and size are here, its contents are not."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (int64[n] ids) => (int64[n] y, int64[1] size)
        <int64[4] table = {1, 2, 3, 4}, int64[1] one = {1}>
        { shifted = Add (table, one) y = Gather (shifted, ids) size = Shape (table) }"""
    )
    model.graph.initializer[0].ClearField("int64_data")
    lowered = for_one_request(model, "decomposed")
    assert [n.op_type for n in lowered.graph.node] == ["Add", "Gather", "Shape"]
    lowered.graph.initializer[0].int64_data[:] = [1, 2, 3, 4]
    assert run(lowered, {"ids": np.array([3, 0])})["y"].tolist() == [5, 2]


@pytest.mark.parametrize("op", ["uses_all_tokens", "rows"])
def test_what_depends_on_integers_outside_the_model_is_not_computed(op):
    model = attention_model("differences")
    large = numpy_helper.from_array(np.ones(1, np.int32), "large")
    large.ClearField("raw_data")
    if op == "rows":
        model.graph.initializer.append(large)
        model.graph.node.append(helper.make_node("Add", ["given", "large"], ["index"]))
        assert lower._as_many_rows(model, "index") is None
        return
    model.graph.initializer.append(large)
    operator = next(n for n in model.graph.node if lower.is_operator(n))
    model.graph.node.insert(0, helper.make_node("Add", ["h", "large"], ["moved"]))
    for node in model.graph.node[1:]:
        if node.op_type == "Slice":
            node.input[0] = "moved"
    assert not lower.uses_all_tokens(model, operator)
