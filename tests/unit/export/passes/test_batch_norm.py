"""A batch normalization before a linear layer: when it goes into the layer, and what that lets the next rule do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from support.rules import freed, same, view_of

from stca.export.freeing import freed_and_proven
from stca.export.passes.batch_norm import Match, NormInLayer, NormOfLayer
from stca.export.passes.rules import Rewrite, View
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("profile", "float32", (1, 64), "user"),
    TensorSpec("item", "float32", ("N_t", 64), "target"),
)
BODY = """one = Constant <value_ints: ints = [1]> () count = Shape <start: int = 0, end: int = 1> (item)
    wide = Concat <axis: int = 0> (count, one) users = Expand (profile, wide) x = Concat <axis: int = 1> (users, item)
    n = BatchNormalization <epsilon: float = 0.01> (x, scale, shift, mean, variance) y = Gemm (n, W, b)
    scores = Tanh (y)"""
WEIGHTS: dict[str, Any] = dict.fromkeys(("scale", "shift", "mean"), (128,))
WEIGHTS |= {"variance": np.linspace(0.5, 2, 128, dtype=np.float32), "W": (128, 80), "b": (80,)}


def view(body: str = BODY, **weights: Any) -> View:
    return view_of(body, INPUTS, {**WEIGHTS, **weights})


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Gemm (n, W, b)", {}),
        ("Gemm <transB: int = 1> (n, W)", {"W": (80, 128)}),
        ("MatMul (n, W)", {}),
    ],
)
def test_it_goes_into_the_layer_behind(layer: str, weights: dict[str, Any]) -> None:
    before = view(BODY.replace("Gemm (n, W, b)", layer), **weights)
    after = freed(before, INPUTS, NormInLayer())
    assert [v.why for v in after.verdicts] == [None]
    assert "BatchNormalization" not in [n.op_type for n in after.model.graph.node]
    for targets in (1, 6):
        same(before.model, after.model, {"profile": (1, 64), "item": (targets, 64)})


def test_then_the_users_part_is_multiplied_once() -> None:
    before = view()
    after = freed_and_proven(before, INPUTS, lambda _: None)
    assert [(v.rule, v.why) for v in after.verdicts] == [
        ("normalization in the layer", None),
        ("sum of products", None),
    ]
    same(before.model, after.model, {"profile": (1, 64), "item": (4, 64)})


def test_what_others_read_stays() -> None:
    (verdict,) = freed(view(BODY.replace("Tanh (y)", "Concat <axis: int = 1> (y, n)")), INPUTS, NormInLayer()).verdicts
    assert verdict.why == "'n' has other readers"


BEHIND = """one = Constant <value_ints: ints = [1]> () count = Shape <start: int = 0, end: int = 1> (item)
    wide = Concat <axis: int = 0> (count, one) users = Expand (profile, wide) x = Concat <axis: int = 1> (users, item)
    y = {layer} n = BatchNormalization <epsilon: float = 0.01> (y, scale, shift, mean, variance) scores = Tanh (n)"""
OF_80: dict[str, Any] = dict.fromkeys(("scale", "shift", "mean", "b"), (80,))
OF_80 |= {"variance": np.linspace(0.5, 2, 80, dtype=np.float32), "W": (128, 80)}


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Gemm (x, W, b)", {}),
        ("Gemm <transB: int = 1> (x, W)", {"W": (80, 128)}),
        ("MatMul (x, W)", {}),
    ],
)
def test_one_behind_a_layer_goes_into_it(layer: str, weights: dict[str, Any]) -> None:
    before = view_of(BEHIND.format(layer=layer), INPUTS, {**OF_80, **weights})
    after = freed_and_proven(before, INPUTS, lambda _: None)
    assert [v.rule for v in after.verdicts if v.why is None] == ["normalization of the layer", "sum of products"]
    assert "BatchNormalization" not in [n.op_type for n in after.model.graph.node]
    same(before.model, after.model, {"profile": (1, 64), "item": (6, 64)})


def test_what_others_read_of_the_layer_stays() -> None:
    body = BEHIND.format(layer="Gemm (x, W, b)").replace("Tanh (n)", "Concat <axis: int = 1> (y, n)")
    (verdict,) = freed(view_of(body, INPUTS, OF_80), INPUTS, NormOfLayer()).verdicts
    assert verdict.why == "'y' has other readers"


@pytest.mark.parametrize("wrong", ["Sqrt", "Sub", "Div"])
def test_a_wrong_rewrite_does_not_pass_the_proof(wrong: str) -> None:
    class Mutant(NormInLayer):
        def rewrite(self, view: View, match: Match) -> Rewrite:
            made = super().rewrite(view, match)
            other = {"Sqrt": "Identity", "Sub": "Add", "Div": "Mul"}[wrong]
            nodes = [
                helper.make_node(other, n.input, n.output, n.name) if n.op_type == wrong else n for n in made.nodes
            ]
            return Rewrite(nodes, made.weights)

    before = view()
    found = freed(before, INPUTS, Mutant())
    assert found.model is before.model
    assert "it does not keep the scores" in (found.verdicts[0].why or "")
