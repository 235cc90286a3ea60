"""Sums over products that are spread out for nothing else."""

from __future__ import annotations

import pytest
from support.rules import freed, same, view_of

from stca.export.freeing import RULES, freed_and_proven
from stca.export.passes.rules import View
from stca.export.passes.spread_sums import SumAsProduct
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("events", "float32", (1, "L", 24), "user"),
    TensorSpec("weights", "float32", ("N_t", "L"), "target"),
    TensorSpec("item", "float32", ("N_t", 24), "target"),
)
SHAPES = {"events": (1, 40, 24), "weights": (30, 40), "item": (30, 24)}
AXES = {"one": [1], "last": [-1], "two": [2], "all": [0, 1], "first": [0]}
END = "scores = ReduceL1 <keepdims: int = 1> (y, last)"

ONCE = "ReduceSum <keepdims: int = 0>"
SPELLINGS = {
    "weights times events": f"w = Unsqueeze (weights, last) p = Mul (w, events) y = {ONCE} (p, one)",
    "events times weights": f"w = Unsqueeze (weights, last) p = Mul (events, w) y = {ONCE} (p, one)",
    "axes kept": "w = Unsqueeze (weights, last) p = Mul (w, events) z = ReduceSum (p, one) y = Squeeze (z, one)",
    "dot products": "q = Unsqueeze (item, one) p = Mul (q, events) y = ReduceSum <keepdims: int = 0> (p, last)",
    "columns before events": """e = Transpose <perm: ints = [0, 2, 1]> (events) w = Unsqueeze (weights, one)
        p = Mul (e, w) y = ReduceSum <keepdims: int = 0> (p, two)""",
    "events before targets": """e = Transpose <perm: ints = [1, 0, 2]> (events)
        t = Transpose <perm: ints = [1, 0]> (weights) w = Unsqueeze (t, last)
        p = Mul (w, e) y = ReduceSum <keepdims: int = 0> (p, first)""",
}


def view(body: str) -> View:
    return view_of(f"{body} {END}", INPUTS, AXES)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_sum_over_a_spread_product_is_a_matrix_product(spelling: str) -> None:
    before = view(SPELLINGS[spelling])
    after = freed(before, INPUTS, SumAsProduct())
    assert [v.why for v in after.verdicts] == [None]
    kinds = [n.op_type for n in after.model.graph.node]
    assert kinds.count("MatMul") == 1
    assert not {"Mul", "ReduceSum"}.intersection(kinds)
    same(before.model, after.model, SHAPES)
    same(before.model, after.model, {**SHAPES, "events": (1, 0, 24), "weights": (30, 0)})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("w = Unsqueeze (weights, last) p = Mul (w, events) y = ReduceSum <keepdims: int = 0> (p, last)", ()),
        ("p = Mul (item, item) y = ReduceSum (p, last)", ()),
        ("w = Unsqueeze (weights, last) p = Mul (w, events) z = ReduceSum (p, two) y = Squeeze (z, two)", ()),
    ],
    ids=["no axis in common", "one value twice", "each target's weight at its own event"],
)
def test_what_no_matrix_product_says_stays(body: str, why: tuple[str, ...]) -> None:
    assert freed(view(body), INPUTS, SumAsProduct()).verdicts == why


def test_a_small_sum_stays_with_its_reason() -> None:
    inputs = (
        TensorSpec("events", "float32", (1, 2, 4), "user"),
        TensorSpec("weights", "float32", ("N_t", 2), "target"),
    )
    body = "w = Unsqueeze (weights, last) p = Mul (w, events) y = ReduceSum <keepdims: int = 0> (p, one)"
    (verdict,) = freed(view_of(f"{body} {END}", inputs, AXES), inputs, SumAsProduct()).verdicts
    assert "would arrange" in str(verdict.why)


def test_a_product_that_others_read_is_written_anyway() -> None:
    body = f"w = Unsqueeze (weights, last) p = Mul (w, events) s = {ONCE} (p, one)"
    (verdict,) = freed(
        view(f"{body} m = ReduceMax <keepdims: int = 0> (p, one) y = Add (s, m)"), INPUTS, SumAsProduct()
    ).verdicts
    assert verdict.why == "'p' has other readers"


def test_other_rules_leave_it_what_it_is() -> None:
    for rules in (RULES, RULES[::-1]):
        before = view(SPELLINGS["weights times events"])
        after = freed_and_proven(before, INPUTS, lambda _: None, rules)
        assert "MatMul" in [n.op_type for n in after.model.graph.node]
        same(before.model, after.model, SHAPES)
