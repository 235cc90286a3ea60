"""Linear layers of a PReLU: when its linear part goes to the product before, and what becomes of the scores."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import helper
from support.rules import freed, same, view_of

from stca.export.passes.rules import Rewrite, View
from stca.export.passes.slopes import Match, SlopeApart
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("history", "float32", (1, "L", 64), "user"),
    TensorSpec("item", "float32", ("N_t", 64), "target"),
)
BODY = """one = Constant <value_ints: ints = [1]> () column = Unsqueeze (item, two) matrix = Mul (column, U)
    hidden = MatMul (history, matrix) bent = PRelu (hidden, s) product = MatMul (bent, V) y = Add (product, b)
    scores = ReduceSum <keepdims: int = 0> (y, one)"""
WEIGHTS: dict[str, Any] = {"U": (64, 48), "s": (48,), "V": (48, 2), "b": (2,), "two": [2]}
WEIGHTS |= {"lengths": [1, 48], "known": [True, True]}


@pytest.mark.parametrize("slope", [(1,), (48,), (1, 1, 1), (1, 1, 48)])
def test_the_linear_part_joins_the_product_before(slope: tuple[int, ...]) -> None:
    view = view_of(BODY, INPUTS, {**WEIGHTS, "s": slope})
    after = freed(view, INPUTS, SlopeApart())
    assert [(v.node, v.why) for v in after.verdicts] == [("y", None)]
    assert "PRelu" not in [n.op_type for n in after.model.graph.node]
    sizes = View(after.model, view.inputs, view.workload).sizes
    into_history = [sizes.shape(n.input[1]) for n in after.model.graph.node if n.input[:1] == ["history"]]
    assert sorted(map(str, into_history)) == ["(300, 64, 2)", "(300, 64, 48)"]
    for targets, events in ((1, 1), (5, 9)):
        same(view.model, after.model, {"history": (1, events, 64), "item": (targets, 64)})


def test_before_a_narrow_layer_the_linear_part_is_taken_as_it_is() -> None:
    """As of the second of three layers, whose input is no product with a matrix for each target."""
    inner = "first = MatMul (history, matrix) a = Tanh (first) hidden = MatMul (a, X)"
    view = view_of(BODY.replace("hidden = MatMul (history, matrix)", inner), INPUTS, {**WEIGHTS, "X": (48, 48)})
    after = freed(view, INPUTS, SlopeApart())
    assert [v.why for v in after.verdicts] == [None]
    assert "PRelu" not in [n.op_type for n in after.model.graph.node]
    same(view.model, after.model, {"history": (1, 4, 64), "item": (3, 64)})


def test_a_turned_weight_without_a_bias() -> None:
    body = BODY.replace("product = MatMul (bent, V)", 'y = Einsum <equation: string = "blc,nc->bln"> (bent, V)')
    view = view_of(body.replace("y = Add (product, b)", ""), INPUTS, {**WEIGHTS, "V": (2, 48)})
    after = freed(view, INPUTS, SlopeApart())
    assert [v.why for v in after.verdicts] == [None]
    same(view.model, after.model, {"history": (1, 4, 64), "item": (3, 64)})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            ("y = Add (product, b)", "more = ReduceMax (bent) plus = Add (product, b) y = Add (plus, more)"),
            "'bent' has",
        ),
        (
            ("bent = PRelu (hidden, s)", "r = ReduceMean (column, two) bent = PRelu (hidden, r)"),
            "its slope is",
        ),
        (  # its rank is not known: of how many sizes there are, nothing is told
            (
                "bent = PRelu (hidden, s)",
                "sizes = Compress (lengths, known) t = Reshape (s, sizes) bent = PRelu (hidden, t)",
            ),
            "its slope is",
        ),
    ],
)
def test_where_it_stays(change: tuple[str, str], why: str) -> None:
    found = freed(view_of(BODY.replace(*change), INPUTS, WEIGHTS), INPUTS, SlopeApart())
    assert [(v.why or "").startswith(why) for v in found.verdicts] == [True]


def test_a_wide_second_layer_stays() -> None:
    view = view_of(BODY, INPUTS, {**WEIGHTS, "V": (48, 64), "b": (64,)})
    (verdict,) = freed(view, INPUTS, SlopeApart()).verdicts
    assert (verdict.why or "").startswith("apart its products take")


GATE = """scaled = Mul (hidden, f) moved = Add (scaled, t) p = Sigmoid (moved)
    whole = Constant <value_float: float = 1.0> ()"""
DICE = {  # as libraries write it
    "two products": "off = Sub (whole, p) l = Mul (s, off) l2 = Mul (l, hidden) r = Mul (p, hidden) bent = Add (l2, r)",
    "the slope last": "o = Sub (whole, p) l = Mul (o, hidden) l2 = Mul (l, s) r = Mul (p, hidden) bent = Add (r, l2)",
    "one factor": "off = Sub (whole, s) g = Mul (off, p) m = Add (g, s) bent = Mul (hidden, m)",
}
GATED = {**WEIGHTS, "f": (48,), "t": (48,)}


def gated(spelled: str, **weights: tuple[int, ...]) -> View:
    return view_of(BODY.replace("bent = PRelu (hidden, s)", f"{GATE} {spelled}"), INPUTS, {**GATED, **weights})


def test_a_gate_that_widens_its_value_is_no_match() -> None:
    """One column that 48 features gate: the layer behind takes 48, and the product before makes one."""
    assert list(freed(gated(DICE["one factor"], U=(64, 1)), INPUTS, SlopeApart()).verdicts) == []


@pytest.mark.parametrize("spelled", DICE)
def test_of_a_gate_one_product_with_what_it_gates_is_left(spelled: str) -> None:
    view = gated(DICE[spelled])
    after = freed(view, INPUTS, SlopeApart())
    assert [(v.node, v.why) for v in after.verdicts] == [("y", None)]
    rewritten = View(after.model, view.inputs, view.workload)
    assert [n.op_type for n in rewritten.readers("p")] == ["Mul"]
    for targets, events in ((1, 1), (5, 9)):
        same(view.model, after.model, {"history": (1, events, 64), "item": (targets, 64)})


@pytest.mark.parametrize(
    "spelled",
    [
        "bent = Mul (hidden, p)",  # SiLU and kin: nothing in it is linear
        "off = Sub (whole, p) l = Mul (off, hidden) r = Mul (p, moved) bent = Add (l, r)",
        "r = Mul (p, hidden) bent = Add (r, whole)",
        f"x0 = Mul (p, hidden) {' '.join(f'x{i + 1} = Add (x{i}, hidden)' for i in range(1500))} bent = Neg (x1500)",
    ],
    ids=["no linear part", "two that are gated", "a constant", "a sum of many"],
)
def test_what_is_no_gate_of_one_value_is_no_match(spelled: str) -> None:
    assert not freed(gated(spelled), INPUTS, SlopeApart()).verdicts


@pytest.mark.parametrize("spelled", ["the slope last", "two products"])
def test_a_gate_with_a_wrong_sign_does_not_pass_the_proof(spelled: str) -> None:
    class Mutant(SlopeApart):
        def rewrite(self, view: View, match: Match) -> Rewrite:
            made = super().rewrite(view, match)
            nodes = [helper.make_node("Add", n.input, n.output) if n.op_type == "Sub" else n for n in made.nodes]
            return Rewrite(nodes, made.weights)

    view = gated(DICE[spelled])
    assert freed(view, INPUTS, Mutant()).model is view.model


@pytest.mark.parametrize("wrong", ["Sub", "Relu", "Mul"])
def test_a_wrong_rewrite_does_not_pass_the_proof(wrong: str) -> None:
    other = {"Sub": "Add", "Relu": "Abs", "Mul": "Add"}[wrong]

    class Mutant(SlopeApart):
        def rewrite(self, view: View, match: Match) -> Rewrite:
            made = super().rewrite(view, match)
            nodes = [
                helper.make_node(other, n.input, n.output, n.name) if n.op_type == wrong else n for n in made.nodes
            ]
            return Rewrite(nodes, made.weights)

    view = view_of(BODY, INPUTS, WEIGHTS)
    found = freed(view, INPUTS, Mutant())
    assert found.model is view.model
    assert "it does not keep the scores" in (found.verdicts[0].why or "")
    onnx.checker.check_model(found.model)
