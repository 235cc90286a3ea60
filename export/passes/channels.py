"""Layers with their channels first as layers over the last axis: `Conv` with a kernel of 1, and the turns around it.

A convolution over one place at a time is `W x` in each, so `x [N, K, L]` turned to `[N, L, K]` goes through an ordinary
layer, whose input the rule for sums of products parts. Between two such layers, and before the first, axes are turned
there and back: what is between is done to the turned values, and both are gone. Where the way up ends at values that
are smaller, as those of one user and of each target that are joined, these are turned instead.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import onnx

from stca.export.analysis.operators import ELEMENTWISE
from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.nodes import NewNodes
from stca.export.passes.norms import factor_and_shift, is_evaluated
from stca.export.passes.rules import Rewrite, View

# Nodes between two turns: activations are a few, each of a handful.
_MOST_BETWEEN: Final = 64


class ConvAsLayer:
    """Write a convolution with a kernel of 1 as a product with its matrix."""

    name = "convolution as a layer"

    def pattern(self, view: View, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """A `Conv` of a target's value that reads one place at a time, its weight constant."""
        if node.op_type != "Conv" or node.domain or view.scopes[node.input[0]] != Scope.TARGET:
            return None
        kernel = view.sizes.shape(node.input[1])
        plain = kernel is not None and len(kernel) > 2 and math.prod(kernel[2:]) == 1
        plain = plain and attribute(node, "group", 1) == 1 and not any(attribute(node, "pads", ()))
        plain = plain and all(n == 1 for n in attribute(node, "strides", ()))
        return node if plain and all(view.scopes[n] == Scope.CONSTANT for n in node.input[1:]) else None

    def check(self, view: View, match: onnx.NodeProto) -> str | None:
        """Always: it is as much work, and turning is undone where it can be."""
        return None

    def rewrite(self, view: View, match: onnx.NodeProto) -> Rewrite:
        """Turned, multiplied, and turned back."""
        new, out = NewNodes(view.taken), match.output[0]
        rank = len(view.sizes.shape(match.input[1]) or ())
        last = [0, *range(2, rank), 1]
        turned = new.node("Transpose", [match.input[0]], f"{out}_turned", perm=last)
        matrix = new.node("Squeeze", [match.input[1], new.integers([*range(2, rank)])], f"{out}_matrix")
        matrix = new.node("Transpose", [matrix], f"{out}_matrix", perm=[1, 0])
        made = new.node("MatMul", [turned, matrix], f"{out}_product")
        if len(match.input) > 2 and match.input[2]:
            made = new.node("Add", [made, match.input[2]], f"{out}_layer")
        new.node("Transpose", [made], f"{out}_back", perm=[0, rank - 1, *range(1, rank - 1)])
        new.last_makes(out)
        return Rewrite(new.nodes, new.weights)


Way: TypeAlias = tuple[str, tuple[int, ...]]  # a value, and how it is turned


@dataclass(frozen=True)
class Turn:
    """A Transpose that is cheaper further up.

    Attributes:
        out: what the Transpose makes.
        first: what it turns.
        between: the ways that it is moved along, and for each the ways on; a way that is no key ends the move.
        read_by: what else reads a value between; empty where nothing does.
    """

    out: str
    first: Way
    between: dict[Way, list[Way]]
    read_by: str


class TurnedOnce:
    """Turn axes where there is least to turn: not at all where they are turned there and back."""

    name = "turned once"

    def pattern(self, view: View, node: onnx.NodeProto) -> Turn | None:
        """A Transpose of a target's value, in whose place fewer elements can be turned above it."""
        if not is_turn(node) or view.scopes[node.input[0]] != Scope.TARGET:
            return None
        first = (node.input[0], tuple(attribute(node, "perm", ())))
        between = _between(view, first)
        if between is None:
            return None
        ends = sorted({way for on in ([first], *between.values()) for way in on if way not in between})
        if _turned_after(view, ends) >= _turned_before(view, node, between, ends):
            return None
        inside = {name for name, _ in between}
        for name, perm in sorted(between) if not _costs_nothing(view, inside) else ():
            if view.is_output(name):
                return Turn(node.output[0], first, between, name)
            for reader in view.readers(name):
                same = is_turn(reader) and tuple(attribute(reader, "perm", ())) == perm
                if reader.output[0] not in inside and not same:
                    return Turn(node.output[0], first, between, reader.output[0])
        return Turn(node.output[0], first, between, "")

    def check(self, view: View, match: Turn) -> str | None:
        """Only where nothing else reads what is between, which would be made twice."""
        return (
            f"{match.read_by!r} reads a value between the turns, which it would need twice" if match.read_by else None
        )

    def rewrite(self, view: View, match: Turn) -> Rewrite:
        """What is between, on turned values."""
        mover = _Mover(view, match.between)
        mover.new.node("Identity", [mover.moved(match.first)], match.out, exact=True)
        return Rewrite(mover.new.nodes, mover.new.weights)


def is_turn(node: onnx.NodeProto) -> bool:
    """Whether a node is a Transpose that says how."""
    return node.op_type == "Transpose" and not node.domain and bool(attribute(node, "perm", ()))


def undoes(perm: Sequence[int], before: onnx.NodeProto) -> bool:
    """Whether turning by `perm` undoes the Transpose `before`."""
    inner = attribute(before, "perm", ())
    return len(inner) == len(perm) and [inner[i] for i in perm] == list(range(len(perm)))


def _costs_nothing(view: View, between: Collection[str]) -> bool:
    """Whether what is between may be made twice, as views are."""
    return all((made := view.writer(name)) is not None and made.op_type == "Unsqueeze" for name in between)


def _ways_on(view: View, way: Way) -> list[Way] | None:
    """What to turn, and how, so that a value is made turned; None where it has to be turned itself."""
    name, perm = way
    node, rank = view.writer(name), len(perm)
    if node is None or node.domain or view.scopes[name] != Scope.TARGET:
        return None
    if node.op_type == "BatchNormalization":
        return [(node.input[0], perm)] if is_evaluated(view, node) else None
    if node.op_type == "Unsqueeze":
        added = _added_axes(view, node, rank)
        kept = [a for a in range(rank) if a not in added]
        return [(node.input[0], tuple(kept.index(a) for a in perm if a not in added))] if added else None
    if node.op_type == "Expand":
        alike = len(view.sizes.shape(node.input[0]) or ()) == rank
        return [(node.input[0], perm)] if alike else None
    if node.op_type != "Concat" and node.op_type not in ELEMENTWISE:
        return None
    values = [n for n in node.input if n and view.scopes[n] != Scope.CONSTANT]
    fit = all(len(view.sizes.shape(n) or ()) == rank for n in values)
    known = all(view.sizes.shape(n) is not None for n in node.input if n)
    return [(n, perm) for n in values] if values and fit and known else None


def _added_axes(view: View, node: onnx.NodeProto, rank: int) -> list[int]:
    axes = view.constant(node.input[1]) if len(node.input) > 1 else None
    return [] if axes is None else [a % rank for a in axes.ravel().tolist()]


def _between(view: View, first: Way) -> dict[Way, list[Way]] | None:
    """The ways that a turn can be moved along; None where they are many."""
    between: dict[Way, list[Way]] = {}
    ahead = [first]
    while ahead:
        way = ahead.pop()
        on = None if way in between else _ways_on(view, way)
        if on is not None:
            if len(between) == _MOST_BETWEEN:
                return None
            between[way] = on
            ahead += on
    return between


def _as_one(view: View, way: Way) -> Way:
    """A value turned, or turned twice, as one turned once."""
    name, perm = way
    node = view.writer(name)
    if node is None or not is_turn(node):
        return way
    inner = attribute(node, "perm", ())
    return node.input[0], tuple(inner[a] for a in perm)


def _stays(perm: Sequence[int]) -> bool:
    return list(perm) == list(range(len(perm)))


def _turned_after(view: View, ends: Sequence[Way]) -> int:
    return sum(view.sizes.elements(n) for n, perm in {_as_one(view, way) for way in ends} if not _stays(perm))


def _turned_before(view: View, node: onnx.NodeProto, between: dict[Way, list[Way]], ends: Sequence[Way]) -> int:
    """Elements that are turned now, by this Transpose and by those above that nothing else reads."""
    inside = {*(name for name, _ in between), node.output[0]}
    above = {name for name, _ in ends if (made := view.writer(name)) is not None and is_turn(made)}
    gone = [n for n in above if all(r.output[0] in inside for r in view.readers(n)) and not view.is_output(n)]
    return sum(view.sizes.elements(n) for n in (node.output[0], *gone))


class _Mover:
    """Makes the nodes between turns again, on turned values."""

    def __init__(self, view: View, between: dict[Way, list[Way]]) -> None:
        self.view, self.between, self.new = view, between, NewNodes(view.taken)
        self._made: dict[Way, str] = {}

    def moved(self, way: Way) -> str:
        """A value, turned."""
        if way not in self._made:
            self._made[way] = self._again(way) if way in self.between else self._turned(_as_one(self.view, way))
        return self._made[way]

    def _turned(self, way: Way) -> str:
        name, perm = way
        return name if _stays(perm) else self.new.node("Transpose", [name], f"{name}_turned", perm=list(perm))

    def _again(self, way: Way) -> str:
        name, perm = way
        node, stem = self.view.writer(name), f"{name}_turned"
        assert node is not None
        if node.op_type == "BatchNormalization":
            return self._normalized(node, perm, stem)
        if node.op_type == "Unsqueeze":
            added = _added_axes(self.view, node, len(perm))
            axes = self.new.integers([i for i, a in enumerate(perm) if a in added])
            return self.new.node("Unsqueeze", [self.moved(self.between[way][0]), axes], stem)
        if node.op_type == "Expand":
            sizes = self._sizes(node, perm)
            return self.new.node("Expand", [self.moved(self.between[way][0]), sizes], stem)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self._input(n, perm) if n else "" for n in node.input]
        copy.name = copy.output[0] = self.new.name(stem)
        if node.op_type == "Concat":
            (axis,) = (a for a in copy.attribute if a.name == "axis")
            axis.i = perm.index(axis.i % len(perm))
        self.new.nodes.append(copy)
        return str(copy.output[0])

    def _sizes(self, node: onnx.NodeProto, perm: tuple[int, ...]) -> str:
        """The sizes that a value is repeated to, turned; those that are left out are its own."""
        sizes, stem = node.input[1], f"{node.output[0]}_sizes"
        if missing := len(perm) - (self.view.sizes.shape(sizes) or (len(perm),))[0]:
            sizes = self.new.node("Concat", [self.new.integers([1] * missing), sizes], stem, axis=0)
        return self.new.node("Gather", [sizes, self.new.integers(perm)], stem)

    def _input(self, name: str, perm: tuple[int, ...]) -> str:
        if self.view.scopes[name] != Scope.CONSTANT:
            return self.moved((name, perm))
        shape = self.view.sizes.shape(name) or ()
        if math.prod(shape) == 1:
            return name
        if missing := len(perm) - len(shape):
            name = self.new.node("Unsqueeze", [name, self.new.integers([*range(missing)])], f"{name}_wide")
        return self.new.node("Transpose", [name], f"{name}_turned", perm=list(perm))

    def _normalized(self, node: onnx.NodeProto, perm: tuple[int, ...], stem: str) -> str:
        """`(x - mean) factor + shift` along the axis that was the second, its numbers constants."""
        factor, moved = factor_and_shift(self.view, self.new, node, stem)
        behind = len(perm) - 1 - perm.index(1)
        if behind:
            axes = self.new.integers([*range(1, behind + 1)])
            factor, moved = (self.new.node("Unsqueeze", [n, axes], f"{n}_wide") for n in (factor, moved))
        scaled = self.new.node("Mul", [self.moved((node.input[0], perm)), factor], f"{stem}_scaled")
        return self.new.node("Add", [scaled, moved], stem)
