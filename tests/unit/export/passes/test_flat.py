"""Fields in one tensor that is flattened, as each flattened alone: then a user's field is found by the next rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.rules import freed, same, view_of

from stca.export.freeing import RULES, freed_and_proven
from stca.export.passes.flat import FlatApart, Match
from stca.export.passes.rules import Rewrite, Rule, View
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("profile", "float32", (1, 3, 32), "user"),
    TensorSpec("item", "float32", ("N_t", 32), "target"),
)
BODY = """one = Constant <value_ints: ints = [1]> () count = Shape <start: int = 0, end: int = 1> (item)
    wide = Concat <axis: int = 0> (count, one, one) column = Unsqueeze (item, one) users = Expand (profile, wide)
    fields = Concat <axis: int = 1> (users, column, column) flat = Reshape (fields, shape) y = Gemm (flat, W, b)
    scores = Tanh (y)"""
WEIGHTS = {"W": (160, 64), "b": (64,), "shape": [-1, 160]}


@pytest.mark.parametrize("flatten", ["Reshape (fields, shape)", "Flatten <axis: int = 1> (fields)"])
def test_fields_are_flattened_before_they_are_concatenated(flatten: str) -> None:
    body = BODY.replace("Reshape (fields, shape)", flatten)
    view = view_of(body, INPUTS, WEIGHTS if "Reshape" in flatten else {n: WEIGHTS[n] for n in "Wb"})
    after = freed(view, INPUTS, FlatApart())
    assert [v.why for v in after.verdicts] == [None]
    for targets in (1, 6):
        same(view.model, after.model, {"profile": (1, 3, 32), "item": (targets, 32)})


@pytest.mark.parametrize("rules", [RULES, RULES[::-1]], ids=["in order", "reversed"])
def test_a_users_fields_are_then_multiplied_once(rules: Sequence[Rule]) -> None:
    view = view_of(BODY, INPUTS, WEIGHTS)
    after = freed_and_proven(view, INPUTS, lambda _: None, rules)
    assert {(v.rule, v.why) for v in after.verdicts} == {("flattened apart", None), ("sum of products", None)}
    assert "Expand" not in [n.op_type for n in after.model.graph.node]
    same(view.model, after.model, {"profile": (1, 3, 32), "item": (4, 32)})


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (("Concat <axis: int = 1> (users, column, column)", "Concat <axis: int = 1> (column, column)"), [-1, 64]),
        (("users = Expand (profile, wide)", "users = Expand (column, long)"), [-1, 160]),  # along the fields themselves
    ],
)
def test_other_flattened_values_are_no_match(change: tuple[str, str], shape: list[int]) -> None:
    weights = {**WEIGHTS, "W": (shape[1], 64), "shape": shape, "long": [1, 3, 1]}
    view = view_of(BODY.replace(*change), INPUTS, weights)
    assert not freed(view, INPUTS, FlatApart()).verdicts


def test_fields_of_any_number_stay() -> None:
    inputs = (TensorSpec("profile", "float32", (1, "F", 32), "user"), INPUTS[1])
    body = BODY.replace("y = Gemm (flat, W, b)", "y = ReduceMean (flat, one)")
    view = view_of(body, inputs, {"shape": [0, -1]}, {"N_t": 300, "F": 3})
    (verdict,) = freed(view, inputs, FlatApart()).verdicts
    assert verdict.why == "'users' is of any size there"


class Swapped(FlatApart):
    """Puts the flattened parts together in another order."""

    def rewrite(self, view: View, match: Match) -> Rewrite:
        made = super().rewrite(view, match)
        made.nodes[-1].input[:] = made.nodes[-1].input[::-1]
        return made


class Unrepeated(FlatApart):
    """Repeats the rows of no field: right for one target alone."""

    def rewrite(self, view: View, match: Match) -> Rewrite:
        made = super().rewrite(view, match)
        alone = {n.output[0]: n.input[0] for n in made.nodes if n.op_type == "Expand"}
        made.nodes[-1].input[:] = [alone.get(n, n) for n in made.nodes[-1].input]
        return made


@pytest.mark.parametrize("rule", [Swapped(), Unrepeated()])
def test_wrong_parts_are_not_kept(rule: FlatApart) -> None:
    view = view_of(BODY, INPUTS, WEIGHTS)
    found = freed_and_proven(view, INPUTS, lambda _: None, [rule])
    assert found.model is view.model
    assert all("it does not keep the scores" in (v.why or "") for v in found.verdicts)
