"""A product of two values that is spread out only to be summed, as one matrix product.

`(weights[:, :, None] * history).sum(1)` writes a number for each target, event and column, and reads it again; so does
a dot product as `(query[:, None] * key).sum(-1)`. A MatMul adds them up as it makes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import onnx

from stca.export.analysis.layout import Layout, Tried, product
from stca.export.passes.linear import MOVED, STARTED
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View

_FLOATS: Final = frozenset((onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16))


@dataclass(frozen=True)
class Operand:
    """A factor by labels of its axes.

    Attributes:
        value: its name.
        labels: of each axis.
        own: those along which the other factor repeats.
        shape: in a nominal request; None where that is not known.
    """

    value: str
    labels: tuple[int, ...]
    own: tuple[int, ...]
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Match:
    """A sum over the one axis that two factors share; the second has one axis besides.

    Attributes:
        name, out: of the sum, and labels of its axes.
        spread: the product that is summed.
        summed: the label that is summed over.
        many, one: the factors.
    """

    name: str
    out: tuple[int, ...]
    spread: str
    summed: int
    many: Operand
    one: Operand


class SumAsProduct:
    """Write a ReduceSum over a Mul as a MatMul."""

    name = "sum as a product"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A sum that one MatMul can say."""
        if node.op_type != "ReduceSum" or view.sizes.element_type(node.output[0]) not in _FLOATS:
            return None
        try:
            made, other = (product(view.flow, run, node) for run in view.tried)
            if made is None or made != other or len(made.summed) != 1:
                return None
            sides = ((made.left, made.left_labels), (made.right, made.right_labels))
            left, right = (_axes(view.tried, name, labels) for name, labels in sides)
        except Layout:
            return None
        if left & right != {*made.summed} or left <= right or right <= left:
            return None
        operands = [
            Operand(
                name, labels, tuple(x for x in made.out_labels if x in axes - {*made.summed}), view.sizes.shape(name)
            )
            for (name, labels), axes in zip(sides, (left, right), strict=True)
        ]
        many, one = sorted(operands, key=lambda side: (-len(side.own), made.out_labels.index(side.own[0])))
        return Match(made.out, made.out_labels, node.input[0], made.summed[0], many, one) if len(one.own) == 1 else None

    def check(self, view: View, match: Match) -> str | None:
        """Only where what is not written is more than what may have to be arranged for it."""
        if why := view.others_read(match.spread):
            return why
        sizes: dict[int, int] = {}
        for side in (match.many, match.one):
            if side.shape is None:
                return "its sizes are not known"
            sizes |= {x: n for x, n in zip(side.labels, side.shape, strict=True) if x in (*side.own, match.summed)}
        rows, columns = (math.prod(sizes[x] for x in side.own) for side in (match.many, match.one))
        spread, kept = rows * columns * sizes[match.summed], (rows + columns) * sizes[match.summed] + rows * columns
        if MOVED * (spread - kept) > STARTED:
            return None
        return f"it writes {spread:,} products, and would arrange {kept:,} numbers to write none"

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The factors without the axes along which they repeat, their product, and its axes as the sum had them."""
        new, (column,) = NewNodes(view.taken), match.one.own
        left = _arranged(new, match.many.value, match.many.labels, (*match.many.own, match.summed))
        right = _arranged(new, match.one.value, match.one.labels, (match.summed, column))
        summed = new.node("MatMul", [left, right], f"{match.name}_summed")
        _arranged(new, summed, (*match.many.own, column), match.out)
        new.last_makes(match.name)
        return Rewrite(new.nodes, new.weights)


def _axes(runs: tuple[Tried, Tried], name: str, labels: tuple[int, ...]) -> set[int]:
    """Labels of a value's axes with more than one coordinate, or none, in either run."""
    return {x for run in runs for x, n in zip(labels, run.shape(name), strict=True) if n != 1}


def _arranged(new: NewNodes, name: str, has: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A value with its axes in the order `wanted`; an axis that goes or comes has one coordinate."""
    if lost := [i for i, x in enumerate(has) if x not in wanted]:
        name = new.node("Squeeze", [name, new.integers(lost)], f"{name}_bare")
    kept = [x for x in has if x in wanted]
    order = [kept.index(x) for x in wanted if x in kept]
    if order != sorted(order):
        name = new.node("Transpose", [name], f"{name}_turned", perm=order)
    if made := [i for i, x in enumerate(wanted) if x not in kept]:
        name = new.node("Unsqueeze", [name, new.integers(made)], f"{name}_wide")
    return name
