"""A linear layer of a PReLU, as one of a ReLU and one of what the PReLU was of: that one joins the product before.

`PReLU(h) W = ReLU(h) (1 - s) W + h s W`, and where `h = k M` is a history's product with a matrix of each target, as
the first layer of an attention unit is, `h s W` is `k (M s W)`: a product with a matrix as narrow as the second layer.
A PReLU takes a branch for each element of `h`, a ReLU none, and `h` is the largest value there is. Before a
narrow layer, as the last one of such a unit, `h s W` is cheap as it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import onnx

from stca.export.analysis.scope import Scope
from stca.export.passes.flat_rows import unflattened
from stca.export.passes.linear import MOVED, STARTED, Linear, linear_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View

# What a PReLU takes beyond a ReLU, in elements moved: 5 to 13 times as long on ONNX Runtime's CPU.
_BRANCHED: Final = 3


@dataclass(frozen=True)
class Match:
    """`linear` of `PReLU(h)`, where `h` is what `product` makes, if it is such a one; sizes are nominal."""

    linear: Linear
    kink: onnx.NodeProto
    product: onnx.NodeProto | None
    hidden: tuple[int, ...]
    outputs: int


class SlopeApart:
    """Take the linear part of a PReLU to the product before it."""

    name = "slope apart"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of a PReLU of a target's value, of a product with a matrix for each target perhaps."""
        linear = linear_at(view, node)
        kink = view.writer(linear.x) if linear else None
        if linear is None or kink is None or kink.domain or kink.op_type != "PRelu":
            return None
        made = unflattened(view, kink.input[0]) or kink.input[0]
        product, hidden = view.writer(made), view.sizes.shape(made)
        if hidden is None or len(hidden) < 2 or view.scopes[made] != Scope.TARGET:
            return None
        if product is not None and (len(hidden) < 3 or not _for_each_target(view, product)):
            product = None
        width = view.sizes.shape(linear.weight) or (0, 0)
        return Match(linear, kink, product, hidden, width[0 if linear.turned else 1])

    def check(self, view: View, match: Match) -> str | None:
        """Only where the slope is a weight of each feature at most, and it is less work."""
        if len(view.readers(match.linear.x)) > 1:
            return f"{match.linear.x!r} has other readers"
        slope = view.sizes.shape(match.kink.input[1])
        constant = view.scopes[match.kink.input[1]] == Scope.CONSTANT
        if slope is None or not constant or math.prod(slope) != math.prod(slope[-1:]):
            return "its slope is no weight of each feature"
        inner, matrix = match.hidden[-1], 0
        rows, n = math.prod(match.hidden[:-1]), match.outputs
        if match.product is not None:
            inner = (view.sizes.shape(match.product.input[0]) or (1,))[-1]
            matrix = 2 * math.prod(view.sizes.shape(match.product.input[1]) or (0,)) * n
        before = rows * match.hidden[-1] * _BRANCHED * MOVED
        after = rows * n * (2 * inner + MOVED) + matrix + 4 * STARTED
        return None if after < before else f"apart it takes as much as {after:.3g} operations more, whole {before:.3g}"

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """Both products and their sum."""
        new, linear = NewNodes(view.taken), match.linear
        weight = linear.weight
        if linear.turned:
            weight = new.node("Transpose", [weight], f"{linear.out}_turned", perm=[1, 0])
        slope = new.node("Reshape", [match.kink.input[1], new.integers([-1, 1])], f"{linear.out}_slope")
        sloped = new.node("Mul", [weight, slope], f"{linear.out}_sloped")
        bent = new.node("Sub", [weight, sloped], f"{linear.out}_bent")
        value, narrow = match.kink.input[0], sloped
        if match.product is not None:
            value, matrix = match.product.input
            narrow = new.node("MatMul", [matrix, sloped], f"{linear.out}_matrix")
        straight = new.node("MatMul", [value, narrow], f"{linear.out}_straight")
        if match.product is not None and match.product.output[0] != match.kink.input[0]:  # rows put into one axis
            straight = new.node("Reshape", [straight, new.integers([-1, match.outputs])], f"{linear.out}_flat")
        positive = new.node("Relu", [match.kink.input[0]], f"{linear.out}_positive")
        total = new.node("MatMul", [positive, bent], f"{linear.out}_kinked")
        total = new.node("Add", [total, straight], f"{linear.out}_sum")
        if linear.bias:
            new.node("Add", [total, linear.bias], f"{linear.out}_sum")
        new.last_makes(linear.out)
        return Rewrite(new.nodes, new.weights)


def _for_each_target(view: View, node: onnx.NodeProto) -> bool:
    """Whether a node is a product of a user's value with a matrix for each target."""
    if node.domain or node.op_type != "MatMul":
        return False
    value, matrix = (view.scopes[name] for name in node.input)
    return value < Scope.TARGET == matrix
