"""A pointwise graph lifted: one row for the user, a row per target, and each score that of the target alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from support.errors import one_line

from stca.errors import SplitError
from stca.export.lifting import lifted_and_proven
from stca.export.passes.lift import lift
from stca.specs import TensorSpec

USER = TensorSpec("hist", "int64", ("B", "L"), "user", 40)
PAGE = TensorSpec("page", "float32", ("B", 8), "request")
ITEM = TensorSpec("item", "int64", ("B",), "target", 40)
TYPES = {"int64": "int64", "float32": "float"}


def model(body: str, *inputs: TensorSpec, out: str = "float[B] score") -> onnx.ModelProto:
    """A graph with tables of 40 rows of 8 (`items`), weights `w [8, 8]`, `wide [16, 1]` and integers `m1, i0, i1 …`."""
    given = ", ".join(f"{TYPES[s.dtype]}[{', '.join(map(str, s.shape))}] {s.name}" for s in inputs)
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g ({given}) => ({out}) {{ {body} }}')
    rng = np.random.default_rng(0)
    weights = {
        "items": rng.standard_normal((40, 8)),
        "w": rng.standard_normal((8, 8)),
        "wide": rng.standard_normal((16, 1)),
        "c8": rng.standard_normal(8),
    }
    integers = {
        "m1": [-1],
        "i0": [0],
        "i1": [1],
        "i8": [8],
        "heads": [-1, 4],
        "pairs": [-1, 2],
        "one": [1],
        "baked": [4, -1, 8],
    }
    used = {n for node in made.graph.node for n in node.input}
    for name, x in {
        **{n: v.astype(np.float32) for n, v in weights.items()},
        **{n: np.array(v, np.int64) for n, v in integers.items()},
        "zero": np.array(0, np.int64),
        "step": np.array(1, np.int64),
    }.items():
        if name in used:
            made.graph.initializer.append(numpy_helper.from_array(x, name))
    onnx.checker.check_model(made, full_check=True)
    return made


def proven(body: str, *inputs: TensorSpec, out: str = "float[B] score"):
    lifted = lifted_and_proven(model(body, *inputs, out=out), inputs, lambda _: None)
    assert lifted is not None
    onnx.checker.check_model(lifted.model, full_check=True)
    return lifted


def expands(lifted) -> list[str]:
    """What is expanded to the targets."""
    return [n.input[0] for n in lifted.model.graph.node if n.op_type == "Expand" and "targets_shape" in n.input[1]]


EMBED = "h = Gather(items, hist) t = Gather(items, item)"
MEAN = EMBED + " u = ReduceMean<keepdims=0>(h, i1)"


def test_a_two_tower_needs_nothing_more():
    lifted = proven(MEAN + " p = Mul(u, t) score = ReduceSum<keepdims=0>(p, m1)", USER, ITEM)
    assert {s.name: s.shape for s in lifted.inputs} == {"hist": (1, "L"), "item": ("N_t",)}
    assert [d.dim_param for d in lifted.model.graph.output[0].type.tensor_type.shape.dim] == ["N_t"]
    assert not expands(lifted)


def test_what_does_not_broadcast_is_expanded_at_the_latest_place():
    lifted = proven(MEAN + " c = Concat<axis=1>(u, t) score = MatMul(c, wide)", USER, ITEM, out="float[B, 1] score")
    assert expands(lifted) == ["u"]


def test_request_values_have_one_row_too():
    lifted = proven(MEAN + " s = Add(u, page) p = Mul(s, t) score = ReduceSum<keepdims=0>(p, m1)", USER, PAGE, ITEM)
    assert {s.name: s.shape[0] for s in lifted.inputs} == {"hist": 1, "page": 1, "item": "N_t"}


SCORE = " p = Mul(v, t) score = ReduceSum<keepdims=0>(p, m1)"
CASES = {
    "the user's shape read by a target": MEAN
    + " b = Shape<start=0, end=1>(u) s = Concat<axis=0>(b, i8) v = Reshape(u, s) t2 = Reshape(t, s) q = Add(t2, v)"
    + SCORE,
    "a target's shape read by the user": EMBED
    + " b = Shape(item) s = Concat<axis=0>(b, m1, i8) g = Reshape(h, s) v = ReduceMean<keepdims=0>(g, i1)"
    + SCORE,
    "heads folded into the batch": MEAN
    + " uh = Reshape(u, heads) th = Reshape(t, heads) q = Mul(uh, th) c = Concat<axis=1>(q, uh)"
    " s = ReduceSum<keepdims=0>(c, m1) r = Reshape(s, pairs) score = ReduceSum<keepdims=0>(r, m1)",
    "heads before the batch": MEAN
    + " u1, u2 = Split<axis=1, num_outputs=2>(u) t1, t2 = Split<axis=1, num_outputs=2>(t)"
    " uh = Concat<axis=0>(u1, u2) th = Concat<axis=0>(t1, t2) c = Concat<axis=1>(uh, th) q = Softmax(c)"
    " q1, q2 = Split<axis=0, num_outputs=2>(q) d = Sub(q1, q2) e = Mul(d, c8) score = ReduceSum<keepdims=0>(e, m1)",
    "an einsum": MEAN + ' score = Einsum<equation="bd,bd->b">(u, t)',
    "attention in einsums": EMBED
    + ' l = Einsum<equation="bd,bld->bl">(t, h) a = Softmax(l) v = Einsum<equation="bl,bld->bd">(a, h)'
    + SCORE,
    "places in the batch as indices": MEAN
    + " n = Shape(item) n0 = Squeeze(n) r = Range(zero, n0, step) k = ArgMax<axis=1, keepdims=1>(u)"
    " r1 = Unsqueeze(r, i1) at = Concat<axis=1>(r1, k) x = GatherND(t, at) x1 = Unsqueeze(x, i1) v = Mul(x1, u)"
    + SCORE,
    "users repeated before the model": EMBED
    + " b = Shape(item) s = Concat<axis=0>(b, one, one) g = Tile(h, s) v = ReduceMean<keepdims=0>(g, i1)"
    + SCORE,
}


@pytest.mark.parametrize("case", [c for c in CASES if c != "users repeated before the model"])
def test_each_target_scores_as_alone(case):
    proven(CASES[case], USER, ITEM)


def test_einsum_takes_the_user_without_its_row():
    assert not expands(proven(CASES["attention in einsums"], USER, ITEM))


def test_a_user_repeated_for_the_targets_is_one_row_again():
    user = TensorSpec("hist", "int64", (1, "L"), "user", 40)
    item = TensorSpec("item", "int64", ("n",), "target", 40)
    lifted = proven(CASES["users repeated before the model"], user, item, out="float[n] score")
    assert not lifted.shared
    scopes = {n.output[0]: n for n in lifted.model.graph.node}
    flow = {n for node in scopes.values() if node.op_type == "Tile" for n in node.input}
    assert "item" not in flow
    assert {s.name: s.shape for s in lifted.inputs} == {"hist": (1, "L"), "item": ("N_t",)}


def test_request_level_models_are_left_alone():
    user = TensorSpec("hist", "int64", (1, "L"), "user", 40)
    item = TensorSpec("item", "int64", ("N_t",), "target", 40)
    assert lift(model(MEAN + " score = MatMul(t, w)", user, item, out="float[N_t, 8] score"), (user, item)) is None
    listed = TensorSpec("item", "int64", ("B", "cand"), "target", 40)
    body = MEAN + " v = Unsqueeze(u, i1)" + SCORE
    assert lift(model(body, USER, listed, out="float[B, cand] score"), (USER, listed)) is None


def test_rows_that_see_each_other_are_refused():
    """Against a batch of copies such a model would pass: alone, y minus its mean is 0."""
    body = MEAN + " p = Mul(u, t) y = ReduceSum<keepdims=0>(p, m1) mean = ReduceMean<keepdims=0>(y, i0)"
    with one_line(SplitError, "depends on the other rows of its batch: node 'mean' (ReduceMean)"):
        proven(body + " score = Sub(y, mean)", USER, ITEM)


def test_a_batch_of_the_trace_is_refused_by_node_and_size():
    body = EMBED + " g = Reshape(h, baked) v = ReduceMean<keepdims=0>(g, i1)" + SCORE
    with one_line(SplitError, "its sizes [4, -1, 8] are baked in"):
        proven(body, USER, ITEM)


def test_values_without_rows_are_refused_where_targets_need_them():
    body = EMBED + " some = NonZero(hist) at = Transpose(some) v = GatherND(h, at)"
    with one_line(SplitError, "for each target, but those cannot be told apart"):
        proven(body + ' score = Einsum<equation="kd,bd->b">(v, t)', USER, ITEM)


def test_a_loop_over_rows_is_refused_with_the_way_round_for_bags():
    body = """count = Size(item) yes = Constant<value: tensor = bool {1}>() none = SequenceEmpty()
        all = Gather(items, item)
        rows = Loop<body = each (int64 i, bool go, seq(float[8]) before) => (bool on, seq(float[8]) after) {
            on = Identity(go) row = Gather(all, i) after = SequenceInsert(before, row)
        }>(count, yes, none)
        t = ConcatFromSequence<axis: int = 0, new_axis: int = 1>(rows) u = Gather(items, hist)
        first = ReduceMean<keepdims: int = 0>(u, one) both = Mul(t, first)
        score = ReduceSum<keepdims: int = 0>(both, one)"""
    with pytest.raises(SplitError, match=r"\(Loop\) does not keep the rows .*`stca export --model` .*set padding_idx"):
        proven(body, USER, ITEM)
