"""Scopes follow the dataflow, bodies of control flow included, and a path can be shown for each."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper, parser
from support.graphs import attention_graph

from stca.errors import SplitError
from stca.export.analysis.scope import Dataflow, Scope, explain, infer_scopes, reads, walk

MARKS = {"user_x": "user", "request_x": "request", "target_x": "target"}

MODEL = parser.parse_model("""
    <ir_version: 10, opset_import: ["": 18]>
    g (float[N, 4] user_x, float[1, 4] request_x, float[M, 4] target_x) => (float[M, N] scores)
    <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
    {
        two = Constant <value_float: float = 2.0> ()
        w2 = Mul (w, two)
        h = MatMul (user_x, w2)
        a = Add (h, request_x)
        b = Exp (a)
        c = Add (b, request_x)
        turned = Transpose <perm: ints = [1, 0]> (c)
        scores = MatMul (target_x, turned)
    }""")


def test_a_value_has_the_highest_scope_it_depends_on() -> None:
    scopes = infer_scopes(MODEL, MARKS)
    assert {name: str(scope) for name, scope in scopes.items()} == {
        **MARKS, "w": "constant", "two": "constant", "w2": "constant", "h": "user",
        "a": "request", "b": "request", "c": "request", "turned": "request", "scores": "target",
    }  # fmt: skip


def test_scopes_are_ordered_and_have_names() -> None:
    assert Scope.CONSTANT < Scope.USER < Scope.REQUEST < Scope.TARGET
    assert Scope.of("user") is Scope.USER is Scope.of(Scope.USER)
    assert f"{Scope.REQUEST}" == str(Scope.REQUEST) == "request"
    with pytest.raises(SplitError, match="'page' is not a scope of an input; use user, request or target"):
        Scope.of("page")


NESTED = parser.parse_model("""
    <ir_version: 10, opset_import: ["": 18]>
    g (float[N] user_x, float[N] request_x, float[N] target_x, bool user_flag, bool user_other) => (float[N] y)
    {
        h = Exp (user_x)
        r = Exp (request_x)
        picked = If (user_flag) <
            then_branch = outer () => (float[N] o) {
                l = Neg (h)
                o = If (user_other) <
                    then_branch = inner () => (float[N] i) { i = Add (l, r) },
                    else_branch = other () => (float[N] j) { j = Identity (l) }
                >
            },
            else_branch = flat () => (float[N] f) { f = Identity (h) }
        >
        y = Add (picked, target_x)
    }""")
NESTED_MARKS = {**MARKS, "user_flag": "user", "user_other": "user"}


def test_values_captured_by_a_body_count_at_any_depth() -> None:
    node = NESTED.graph.node[2]
    assert reads(node) == ("user_flag", "h", "user_other", "r")
    assert infer_scopes(NESTED, NESTED_MARKS)["picked"] == Scope.REQUEST
    assert [n.op_type for n in walk([node])] == ["If", "Neg", "If", "Add", "Identity", "Identity"]


def test_an_outer_value_that_a_body_hands_out_is_captured() -> None:
    body = helper.make_graph([], "body", [], [onnx.ValueInfoProto(name="outer")])
    assert reads(helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)) == ("c", "outer")


def test_inputs_of_a_body_are_its_own() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "outer"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        "body", [onnx.ValueInfoProto(name="x")], [onnx.ValueInfoProto(name="z")],
    )  # fmt: skip
    assert reads(helper.make_node("Scan", ["s"], ["t"], body=body, num_scan_inputs=1)) == ("s", "outer")


def test_explain_finds_the_shortest_path() -> None:
    assert explain(MODEL, MARKS, "turned") == ("request_x", "c", "turned")
    assert explain(MODEL, MARKS, "b") == ("request_x", "a", "b")
    assert explain(MODEL, MARKS, "scores", "target") == ("target_x", "scores")
    assert explain(MODEL, MARKS, "request_x") == ("request_x",)
    assert explain(MODEL, MARKS, "h") == ()
    assert explain(NESTED, NESTED_MARKS, "y") == ("request_x", "r", "picked", "y")


def test_explain_names_what_a_time_delta_runs_through() -> None:
    case = attention_graph("projected", delta=True)
    path = explain(case.model, case.scopes, "key_rows")
    time, mlp = ("request_time", "waited", "waited_float", "waited_column"), ("tokens", "hidden", "gated", "projected")
    assert path == (*time, *mlp, "encoded", "key_rows")


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"user_x": "user", "target_x": "target"}, "input 'request_x' has no scope; list it in one of --user-inputs"),
        ({**MARKS, "user_z": "user"}, "no input 'user_z'; its inputs are user_x, request_x, target_x"),
        ({**MARKS, "user_x": "users"}, "'users' is not a scope"),
    ],
)
def test_wrong_marks_are_named(marks: dict[str, str], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        infer_scopes(MODEL, marks)


def test_a_value_that_nothing_makes_is_named() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    del model.graph.node[2]
    with pytest.raises(SplitError, match="reads 'h', which nothing before it makes"):
        infer_scopes(model, MARKS)


def test_needed_stops_at_what_is_given() -> None:
    flow = Dataflow(MODEL.graph)
    assert flow.needed(["turned"]) == ({0, 1, 2, 3, 4, 5, 6}, {"user_x", "request_x", "w"})
    assert flow.needed(["turned"], given=["a"]) == ({4, 5, 6}, {"a", "request_x"})
    assert flow.needed(["a"], given=["a"]) == (set(), {"a"})
