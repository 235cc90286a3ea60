"""Layers over rows in one axis: the Reshape moves behind them, and the rules for what they read then fire."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import helper
from support.rules import freed, same, view_of

from stca.export.freeing import freed_and_proven
from stca.export.passes.flat_rows import Match, RowsKept
from stca.export.passes.rules import Rewrite, View
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("history", "float32", (1, "L", 64), "user"),
    TensorSpec("item", "float32", ("N_t", 64), "target"),
)
BODY = """one = Constant <value_ints: ints = [1]> () column = Unsqueeze (item, one)
    count = Shape <start: int = 0, end: int = 1> (item) events = Shape <start: int = 1, end: int = 2> (history)
    wide = Concat <axis: int = 0> (count, one, one) long = Concat <axis: int = 0> (one, events, one)
    q = Expand (column, long) k = Expand (history, wide) less = Sub (q, k)
    x = Concat <axis: int = -1> (q, k, less) rows = Reshape (x, flat) y = Gemm (rows, W, b) bent = PRelu (y, s)
    weights = Gemm (bent, V, c) shape = Concat <axis: int = 0> (count, events)
    table = Reshape (weights, shape) scores = ReduceMean <keepdims: int = 1> (table, one)"""
WEIGHTS: dict[str, Any] = {"W": (192, 48), "b": (48,), "s": (1,), "V": (48, 1), "c": (1,), "flat": [-1, 192]}


@pytest.mark.parametrize("layer", ["Gemm (rows, W, b)", "Gemm <transB: int = 1> (rows, W)", "MatMul (rows, W)"])
def test_the_layer_reads_rows_as_they_were(layer: str) -> None:
    weights = {**WEIGHTS, "W": (48, 192)} if "transB" in layer else WEIGHTS
    view = view_of(BODY.replace("Gemm (rows, W, b)", layer), INPUTS, weights)
    after = freed(view, INPUTS, RowsKept())
    assert [v.why for v in after.verdicts] == [None]
    same(view.model, after.model, {"history": (1, 5, 64), "item": (3, 64)})


def test_then_the_layer_is_parted_and_the_slope_too() -> None:
    view = view_of(BODY.replace("Sub (q, k)", "Mul (q, k)"), INPUTS, WEIGHTS)
    after = freed_and_proven(view, INPUTS, lambda _: None)
    assert [v.rule for v in after.verdicts if v.why is None] == ["rows kept", "sum of products", "slope apart"]
    for targets, events in ((1, 1), (3, 5)):
        same(view.model, after.model, {"history": (1, events, 64), "item": (targets, 64)})


@pytest.mark.parametrize(
    "change",
    [
        ("Concat <axis: int = -1> (q, k, less)", "Concat <axis: int = -1> (less, less, less)"),
        ("Reshape (x, flat)", "Reshape (x, other)"),
    ],
)
def test_other_rows_are_no_match(change: tuple[str, str]) -> None:
    body = BODY.replace(*change).replace("less = Sub (q, k)", "less = Tanh (k)")
    if "other" in change[1]:  # another last axis
        body = body.replace("Concat <axis: int = -1> (q, k, less)", "Concat <axis: int = 1> (q, k, less)")
    view = view_of(body, INPUTS, {**WEIGHTS, "other": [-1, 192]})
    assert not freed(view, INPUTS, RowsKept()).verdicts


def test_a_wrong_rewrite_does_not_pass_the_proof() -> None:
    class Mutant(RowsKept):
        def rewrite(self, view: View, match: Match) -> Rewrite:
            made = super().rewrite(view, match)
            nodes = [helper.make_node("Sub", n.input, n.output) if n.op_type == "Add" else n for n in made.nodes]
            return Rewrite(nodes, made.weights)

    view = view_of(BODY, INPUTS, WEIGHTS)
    assert freed(view, INPUTS, Mutant()).model is view.model
