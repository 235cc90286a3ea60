"""Rules: where they fire, what is kept of them, and what they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from stca.errors import SplitError
from stca.export.freeing import freed_and_proven
from stca.export.passes.nodes import NewNodes, names_in
from stca.export.passes.rules import Rewrite, Rule, Verdict, View, apply
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("history", "float32", ("N_h", 2), "user"),
    TensorSpec("target", "float32", ("N_t", 2), "target"),
)


def graph() -> onnx.ModelProto:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[N_h, 2] history, float[N_t, 2] target) => (float[N_t, 2] scores)
        <float[2] twice = {2.0, 2.0}> {
            total = ReduceSum <keepdims: int = 1> (history)
            [doubled] doubled_total = Mul (total, twice)
            [last] scores = Add (doubled_total, target)
        }"""
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class Doubling:
    """x · [2, 2] as x + x; refused where the graph's output is next."""

    name = "doubling"
    times = 2

    def pattern(self, view: View, node: onnx.NodeProto) -> Any | None:
        if node.op_type == "Mul" and (twice := view.constant(node.input[1])) is not None and np.all(twice == 2):
            return node
        return node if node.op_type == "Add" and view.is_output(node.output[0]) else None

    def check(self, view: View, match: Any) -> str | None:
        return "it makes the output" if view.is_output(match.output[0]) else None

    def rewrite(self, view: View, match: Any) -> Rewrite:
        new = NewNodes(view.taken)
        made = new.node("Sum", [match.input[0]] * self.times, "sum")
        new.node("Expand", [made, new.integers([2])], match.output[0], exact=True)
        return Rewrite(new.nodes, new.weights)


class Tripling(Doubling):
    times = 3


class Endless(Doubling):
    def rewrite(self, view: View, match: Any) -> Rewrite:
        return Rewrite([match])


def view_of(model: onnx.ModelProto) -> View:
    return View(model, {s.name: str(s.scope) for s in INPUTS}, {"N_h": 8, "N_t": 3})


def test_a_rule_rewrites_and_says_where_not() -> None:
    before = graph()
    view, verdicts = apply(Doubling(), view_of(before))
    assert verdicts == [Verdict("doubling", "doubled"), Verdict("doubling", "last", "it makes the output")]
    assert [n.op_type for n in view.model.graph.node] == ["ReduceSum", "Sum", "Expand", "Add"]
    assert [t.name for t in view.model.graph.initializer] == ["integers_2"]  # `twice` went with its reader
    assert before == graph()
    feeds = {s.name: np.float32([[1, 2], [3, 4]]) for s in INPUTS}
    same = [ReferenceEvaluator(m).run(None, feeds)[0] for m in (before, view.model)]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("rule", [Doubling(), Tripling()])
def test_what_changes_the_scores_is_not_kept(rule: Rule) -> None:
    before, told = graph(), list[str]()
    freed = freed_and_proven(view_of(before), INPUTS, told.append, [rule])
    if isinstance(rule, Tripling):
        assert freed.model is before
        (why,) = (v.why or "" for v in freed.verdicts if v.node == "doubled")
        assert why.startswith("it does not keep the scores: value 'doubled_total' differs by ")
        assert told == []
    else:
        assert freed.model != before
        assert freed.verdicts[0].why is None
        assert told == ["doubling: 1 nodes rewritten"]


def several(times: int) -> onnx.ModelProto:
    """Products with two weights of twos in turn, summed up."""
    lines = [f"m{i} = Mul (total, {'twice' if i % 2 else 'again'})" for i in range(times)]
    sums = ["s0 = Identity (m0)", *(f"s{i} = Add (s{i - 1}, m{i})" for i in range(1, times))]
    return parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[N_h, 2] history, float[N_t, 2] target) => (float[N_t, 2] scores)
        <float[2] twice = {{2.0, 2.0}}, float[2] again = {{2.0, 2.0}}> {{
            total = ReduceSum <keepdims: int = 1> (history)
            {" ".join((*lines, *sums))}
            scores = Add (s{times - 1}, target)
        }}"""
    )


def test_what_rewrites_make_alike_is_made_once() -> None:
    view, verdicts = apply(Doubling(), view_of(several(3)))
    assert [v.node for v in verdicts if v.why is None] == ["m0", "m1", "m2"]
    kinds = [n.op_type for n in view.model.graph.node]
    assert kinds.count("Sum") == 1
    assert kinds.count("Expand") == 3  # values of the graph keep a node of their own
    onnx.checker.check_model(view.model, full_check=True)


class DoublingButOne(Doubling):
    """Triples the second product."""

    def rewrite(self, view: View, match: Any) -> Rewrite:
        return (Tripling if match.output[0] == "m1" else Doubling)().rewrite(view, match)


def test_a_wrong_rewrite_costs_itself_alone() -> None:
    freed = freed_and_proven(view_of(several(4)), INPUTS, lambda _: None, [DoublingButOne()])
    why = {v.node: v.why for v in freed.verdicts}
    assert [n for n in ("m0", "m1", "m2", "m3") if why[n] is None] == ["m0", "m2", "m3"]
    assert "value 'm1' differs by" in (why["m1"] or "")


class Mistyped(Doubling):
    """Right numbers of the wrong type, which only float64 hides."""

    def rewrite(self, view: View, match: Any) -> Rewrite:
        new = NewNodes(view.taken)
        double = new.node("Cast", [match.input[0]], "double", to=onnx.TensorProto.DOUBLE)
        new.node("Add", [double, double], match.output[0], exact=True)
        return Rewrite(new.nodes, new.weights)


def test_what_is_no_valid_graph_is_not_kept() -> None:
    freed = freed_and_proven(view_of(graph()), INPUTS, lambda _: None, [Mistyped()])
    (why,) = (v.why or "" for v in freed.verdicts if v.node == "doubled")
    assert "no valid ONNX" in why


def test_a_graph_may_have_any_number_of_matches() -> None:
    view, verdicts = apply(Doubling(), view_of(several(1500)))
    assert sum(v.why is None for v in verdicts) == 1500
    assert not any(n.op_type == "Mul" for n in view.model.graph.node)


def test_names_in_bodies_are_taken() -> None:
    inner = parser.parse_graph("inner () => (float[2] out) { hidden = Identity (x) out = Neg (hidden) }")
    outer = onnx.helper.make_graph(
        [onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], "g", [], []
    )
    assert {"hidden", "out", "y"} <= names_in(outer)


def test_a_rule_that_never_ends_is_an_error() -> None:
    with pytest.raises(SplitError, match=r"rule 'doubling' does not come to an end at node 'doubled'"):
        apply(Endless(), view_of(graph()))
