"""A layer normalization before an attention unit: the layer first, its input parted, and the factor of each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from support.rules import freed, same, view_of

from stca.export.freeing import freed_and_proven
from stca.export.passes.layer_norm import LayerBeforeNorm, Match
from stca.export.passes.rules import Rewrite, View
from stca.export.passes.to_double import to_double
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("history", "float32", (1, "L", 24), "user"),
    TensorSpec("item", "float32", ("N_t", 1, 24), "target"),
)
SHAPES = {"history": (1, 5, 24), "item": (3, 1, 24)}
BODY = """count = Shape <start: int = 0, end: int = 1> (item) events = Shape <start: int = 1, end: int = 2> (history)
    wide = Concat <axis: int = 0> (count, one, one) long = Concat <axis: int = 0> (one, events, one)
    q = Expand (item, long) k = Expand (history, wide) less = Sub (q, k) like = Mul (q, k)
    x = Concat <axis: int = -1> (k, q, less, like)
    n = LayerNormalization <axis: int = -1, epsilon: float = 0.01> (x, g, s)
    {layer} scores = ReduceMean <keepdims: int = 0> (y, one)"""
LAYERS = {
    "with a bias": "p = MatMul (n, W) y = Add (p, b)",
    "without": "y = MatMul (n, W)",
    "turned": 'y = Einsum <equation: string = "blc,nc->bln"> (n, V)',
}
WEIGHTS: dict[str, Any] = {"W": (96, 16), "V": (16, 96), "b": (16,), "g": (96,), "s": (96,), "one": [1]}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_layer_reads_parts_and_is_normalized_afterwards(layer: str) -> None:
    before = view_of(BODY.format(layer=LAYERS[layer]), INPUTS, WEIGHTS)
    after = freed_and_proven(before, INPUTS, lambda _: None)
    fired = [v.rule for v in after.verdicts if v.why is None]
    assert fired[0] == LayerBeforeNorm.name
    assert fired.count("sum of products") == 2  # the layer, and the mean
    assert not {"LayerNormalization", "Expand"} & {n.op_type for n in after.model.graph.node}
    for targets, events in ((1, 1), (3, 5)):
        same(before.model, after.model, {"history": (1, events, 24), "item": (targets, 1, 24)})


def test_a_bias_of_the_normalization_may_be_left_out() -> None:
    before = view_of(BODY.format(layer=LAYERS["without"]).replace("(x, g, s)", "(x, g)"), INPUTS, WEIGHTS)
    after = freed(before, INPUTS, LayerBeforeNorm())
    assert [v.why for v in after.verdicts] == [None]
    same(before.model, after.model, SHAPES)


@pytest.mark.parametrize(("mean", "deviation"), [(1, 0.01), (10, 0.1), (1000, 1)])
def test_values_far_from_zero_lose_no_digits(mean: float, deviation: float) -> None:
    before = view_of(BODY.format(layer=LAYERS["with a bias"]), INPUTS, WEIGHTS)
    after = freed_and_proven(before, INPUTS, lambda _: None)
    rng = np.random.default_rng(0)
    feeds = {n: (mean + deviation * rng.standard_normal(shape)).astype(np.float32) for n, shape in SHAPES.items()}
    (exact,) = ReferenceEvaluator(to_double(before.model)).run(
        None, {n: x.astype(np.float64) for n, x in feeds.items()}
    )
    found = (ReferenceEvaluator(model).run(None, feeds)[0] for model in (before.model, after.model))
    own, ours = (float(np.abs(scores - exact).max()) for scores in found)
    assert ours <= 2 * own + 4e-6 * float(np.abs(exact).max())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("y = MatMul (n, W)", "p = MatMul (n, W) most = ReduceMax (n) y = Mul (p, most)"), "'n' has other readers"),
        (
            ("(k, q, less, like)", "(k, q, q, like)"),
            "what it normalizes may be nearly constant, where a sum of squares loses digits",
        ),
        (("(k, q, less, like)", "(k, q, less, bent)"), "a part of what it normalizes has as many rows as the whole"),
    ],
)
def test_where_it_stays(change: tuple[str, str], why: str) -> None:
    body = BODY.replace("like = Mul (q, k)", "like = Mul (q, k) bent = Tanh (like)").format(layer=LAYERS["without"])
    found = freed(view_of(body.replace(*change), INPUTS, WEIGHTS), INPUTS, LayerBeforeNorm())
    assert [v.why for v in found.verdicts] == [why]


def test_over_two_axes_it_is_no_match() -> None:
    body = BODY.format(layer=LAYERS["without"]).replace("axis: int = -1, epsilon", "axis: int = 1, epsilon")
    inputs = (TensorSpec("history", "float32", (1, 5, 24), "user"), INPUTS[1])
    view = view_of(body, inputs, {**WEIGHTS, "g": (5, 96), "s": (5, 96)})
    assert not freed(view, inputs, LayerBeforeNorm()).verdicts


@pytest.mark.parametrize(("wrong", "other"), [("Sub", "Add"), ("Div", "Mul"), ("ReduceSum", "ReduceMax")])
def test_a_wrong_rewrite_does_not_pass_the_proof(wrong: str, other: str) -> None:
    class Mutant(LayerBeforeNorm):
        def rewrite(self, view: View, match: Match) -> Rewrite:
            made = super().rewrite(view, match)
            nodes = list(made.nodes)
            i = next(i for i, n in enumerate(nodes) if n.op_type == wrong)
            nodes[i] = helper.make_node(other, nodes[i].input, nodes[i].output, nodes[i].name)
            return Rewrite(nodes, made.weights)

    before = view_of(BODY.format(layer=LAYERS["with a bias"]), INPUTS, WEIGHTS)
    found = freed(before, INPUTS, Mutant())
    assert found.model is before.model
    assert "it does not keep the scores" in (found.verdicts[0].why or "")
