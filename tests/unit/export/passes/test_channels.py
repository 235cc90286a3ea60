"""Attention units written with channels first: convolutions as layers, and turning axes no more than once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper
from support.rules import freed, same, view_of

from stca.export.freeing import freed_and_proven
from stca.export.passes.channels import ConvAsLayer, TurnedOnce
from stca.export.passes.rules import Rewrite, View
from stca.specs import TensorSpec

INPUTS = (
    TensorSpec("events", "float32", (1, "L", 8), "user"),
    TensorSpec("item", "float32", ("N_t", 1, 8), "target"),
)
SHAPES = {"events": (1, 7, 8), "item": (3, 1, 8)}
UNIT = """like = Mul (events, item) users = Shape (like) k = Expand (events, users) q = Expand (item, users)
    x = Concat <axis: int = -1> (k, q, like) first = Transpose <perm: ints = [0, 2, 1]> (x) {unit}
    last = Constant <value_ints: ints = [1, 2]> () scores = ReduceMean <keepdims: int = 0> (y, last)
    """
WEIGHTS: dict[str, Any] = {"W": (12, 24, 1), "b": (12,), "V": (5, 12, 1), "slope": (12, 1)}
WEIGHTS |= {"scale": (12,), "shift": (12,), "mean": (12,), "variance": np.linspace(0.5, 2, 12, dtype=np.float32)}


def view(unit: str) -> View:
    body = UNIT.format(unit=unit).replace("scores = ReduceMean", "all = ReduceMean")
    end = "axes = Constant <value_ints: ints = [1]> () scores = Unsqueeze (all, axes)"
    return view_of(f"{body} {end}", INPUTS, WEIGHTS)


BETWEEN = {
    "an activation": "a = Relu (h)",
    "slopes": "a = PRelu (h, slope)",
    "a gate": "g = Sigmoid (h) a = Mul (g, h)",
    "a normalization": "a = BatchNormalization <epsilon: float = 0.01> (h, scale, shift, mean, variance)",
}


@pytest.mark.parametrize("between", BETWEEN)
def test_convolutions_become_layers_whose_input_is_parted(between: str) -> None:
    before = view(f"h = Conv (first, W, b) {BETWEEN[between]} y = Conv (a, V)")
    after = freed_and_proven(before, INPUTS, lambda _: None)
    assert {v.rule for v in after.verdicts if v.why is None} >= {ConvAsLayer.name, TurnedOnce.name, "sum of products"}
    kinds = [n.op_type for n in after.model.graph.node]
    assert not {"Conv", "BatchNormalization", "Concat"}.intersection(kinds) or kinds.count("Concat") == 1  # of weights
    same(before.model, after.model, SHAPES)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("turned", [True, False], ids=["turned whole", "turned in parts"])
def test_convolutions_over_two_axes_too(axis: int, turned: bool) -> None:
    """`Conv2d` with a kernel of 1 over events with an axis more, of the whole or of parts that are turned first."""
    unit = "u = Unsqueeze (first, axis) h = Conv (u, W, b) a = Sigmoid (h) c = Conv (a, V) y = Squeeze (c, axis)"
    body = UNIT.format(unit=unit).replace("scores = ReduceMean", "all = ReduceMean")
    if not turned:
        parts = " ".join(f"{n}t = Transpose <perm: ints = [0, 2, 1]> ({n})" for n in ("k", "q", "like"))
        whole = "x = Concat <axis: int = -1> (k, q, like) first = Transpose <perm: ints = [0, 2, 1]> (x)"
        assert whole in body
        body = body.replace(whole, f"{parts} first = Concat <axis: int = 1> (kt, qt, liket)")
    end = "end = Constant <value_ints: ints = [1]> () scores = Unsqueeze (all, end)"
    weights = {**WEIGHTS, "W": (12, 24, 1, 1), "V": (5, 12, 1, 1), "axis": [axis]}
    before = view_of(f"{body} {end}", INPUTS, weights)
    after = freed_and_proven(before, INPUTS, lambda _: None)
    assert "sum of products" in {v.rule for v in after.verdicts if v.why is None}, after.verdicts
    assert "Conv" not in [n.op_type for n in after.model.graph.node]
    same(before.model, after.model, SHAPES)


@pytest.mark.parametrize(
    ("conv", "weight"),
    [
        ("Conv <pads: ints = [1, 1]> (first, W, b)", (12, 24, 3)),
        ("Conv <group: int = 2> (first, W, b)", (12, 12, 1)),
        ("Conv <strides: ints = [2]> (first, W, b)", (12, 24, 1)),
        ("Conv <pads: ints = [1, 0]> (first, W, b)", (12, 24, 1)),
    ],
)
def test_a_convolution_over_several_places_stays(conv: str, weight: tuple[int, ...]) -> None:
    before = view_of(
        UNIT.format(unit=f"y = {conv}").replace("scores =", "all =")
        + "axes = Constant <value_ints: ints = [1]> () scores = Unsqueeze (all, axes)",
        INPUTS,
        {**WEIGHTS, "W": weight},
    )
    assert freed(before, INPUTS, ConvAsLayer()).verdicts == ()


def test_what_is_read_between_the_turns_stays() -> None:
    before = view(
        "a = Relu (first) back = Transpose <perm: ints = [0, 2, 1]> (a) both = Constant <value_ints: ints = [1, 2]> () "
        "most = ReduceMax (back, both) y = Mul (a, most)"
    )
    verdicts = {v.node: v.why for v in freed(before, INPUTS, TurnedOnce()).verdicts}
    assert verdicts["back"] == "'y' reads a value between the turns, which it would need twice"


def test_a_size_of_what_is_between_stays_too() -> None:
    before = view(
        "a = Relu (first) back = Transpose <perm: ints = [0, 2, 1]> (a) size = Shape (a) "
        "real = Cast <to: int = 1> (size) most = ReduceMax (real) y = Mul (back, most)"
    )
    verdicts = {v.node: v.why for v in freed(before, INPUTS, TurnedOnce()).verdicts}
    assert verdicts["back"] == "'size' reads a value between the turns, which it would need twice"


def test_many_gates_in_a_row_are_walked_once() -> None:
    """`x · sigmoid(x)` has two ways up, and so many of them 2^16."""
    gates = [f"s{i} = Sigmoid (x{i}) x{i + 1} = Mul (s{i}, x{i})" for i in range(16)]
    before = view(f"x0 = Relu (first) {' '.join(gates)} y = Transpose <perm: ints = [0, 2, 1]> (x16)")
    found = freed(before, INPUTS, TurnedOnce())
    assert [v.why for v in found.verdicts] == [None]
    assert "Transpose" not in [n.op_type for n in found.model.graph.node]


@pytest.mark.parametrize("wrong", ["Transpose", "Add"])
def test_a_wrong_layer_does_not_pass_the_proof(wrong: str) -> None:
    class Mutant(ConvAsLayer):
        def rewrite(self, view: View, match: Any) -> Rewrite:
            made = super().rewrite(view, match)
            nodes = list(made.nodes)
            i = next(i for i, n in reversed(list(enumerate(nodes))) if n.op_type == wrong)
            first = nodes[i].input[0]
            given = {"perm": [1, 0, 2]} if wrong == "Transpose" else {}
            other = "Transpose" if wrong == "Transpose" else "Neg"
            nodes[i] = helper.make_node(other, [first], nodes[i].output, nodes[i].name, **given)
            return Rewrite(nodes, made.weights)

    before = view("y = Conv (first, W, b)")
    found = freed(before, INPUTS, Mutant())
    assert found.model is before.model
    assert "it does not keep the scores" in (found.verdicts[0].why or "")


def test_a_normalization_with_channels_first_goes_into_the_layer_behind() -> None:
    weights = {"W2": (24, 12), **dict.fromkeys(("scale", "shift", "mean"), (24,))}
    weights |= {"variance": np.linspace(0.5, 2, 24, dtype=np.float32)}  # type: ignore[dict-item]
    body = UNIT.format(
        unit="n = BatchNormalization (first, scale, shift, mean, variance) "
        "back = Transpose <perm: ints = [0, 2, 1]> (n) y = MatMul (back, W2)"
    ).replace("scores =", "all =")
    end = "axes = Constant <value_ints: ints = [1]> () scores = Unsqueeze (all, axes)"
    before = view_of(body + end, INPUTS, weights)
    after = freed_and_proven(before, INPUTS, lambda _: None)
    fired = [v.rule for v in after.verdicts if v.why is None]
    assert fired == ["normalization in the layer", "sum of products"]
    same(before.model, after.model, SHAPES)
