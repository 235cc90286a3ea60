"""Layers with their channels first as layers over the last axis: `Conv` with a kernel of 1, and the turns around it.

A convolution over one place at a time is `W x` in each, so `x [N, K, L]` turned to `[N, L, K]` goes through an ordinary
layer, whose input the rule for sums of products parts. Between two such layers, and before the first, axes are turned
there and back: what is between is done to the turned values, and both are gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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


@dataclass(frozen=True)
class Turn:
    """A Transpose that undoes others above it, and what else reads what is between; empty where nothing does."""

    node: onnx.NodeProto
    read_by: str


class TurnedOnce:
    """Do to turned values what is done between a turn and its way back."""

    name = "turned once"

    def pattern(self, view: View, node: onnx.NodeProto) -> Turn | None:
        """A Transpose of a target's value, above which every way ends at what undoes it."""
        if not is_turn(node) or view.scopes[node.input[0]] != Scope.TARGET:
            return None
        perm = tuple(attribute(node, "perm", ()))
        inside = _between(view, node.input[0], perm)
        if inside is None:
            return None
        for name in sorted(inside):
            if view.is_output(name):
                return Turn(node, name)
            for reader in view.readers(name):
                same = is_turn(reader) and tuple(attribute(reader, "perm", ())) == perm
                if reader.output[0] not in inside and not same:
                    return Turn(node, reader.output[0])
        return Turn(node, "")

    def check(self, view: View, match: Turn) -> str | None:
        """Only where nothing else reads what is between, which would be made twice."""
        return f"{match.read_by!r} reads what is between" if match.read_by else None

    def rewrite(self, view: View, match: Turn) -> Rewrite:
        """What is between, on turned values."""
        mover = _Mover(view)
        made = mover.moved(match.node.input[0], tuple(attribute(match.node, "perm", ())))
        mover.new.node("Identity", [made], match.node.output[0], exact=True)
        return Rewrite(mover.new.nodes, mover.new.weights)


def is_turn(node: onnx.NodeProto) -> bool:
    """Whether a node is a Transpose that says how."""
    return node.op_type == "Transpose" and not node.domain and bool(attribute(node, "perm", ()))


def undoes(perm: Sequence[int], before: onnx.NodeProto) -> bool:
    """Whether turning by `perm` undoes the Transpose `before`."""
    inner = attribute(before, "perm", ())
    return len(inner) == len(perm) and [inner[i] for i in perm] == list(range(len(perm)))


def _through(view: View, node: onnx.NodeProto, rank: int) -> list[str] | None:
    """The values that `node` takes element by element, of its own rank; None where it does anything else."""
    if node.domain:
        return None
    if node.op_type == "BatchNormalization":
        return [node.input[0]] if is_evaluated(view, node) else None
    if node.op_type not in ELEMENTWISE:
        return None
    values = [n for n in node.input if n and view.scopes[n] != Scope.CONSTANT]
    fit = all(len(view.sizes.shape(n) or ()) == rank for n in values)
    return values if fit and all(view.sizes.shape(n) is not None for n in node.input if n) else None


def _between(view: View, name: str, perm: tuple[int, ...]) -> set[str] | None:
    """The values from `name` up to the turns that `perm` undoes; None where a way ends elsewhere, or they are many."""
    inside, ahead = set[str](), [name]
    while ahead:
        name = ahead.pop()
        node = view.writer(name)
        if name in inside or (node is not None and is_turn(node) and undoes(perm, node)):
            continue
        values = None if node is None or is_turn(node) else _through(view, node, len(perm))
        if not values or len(inside) == _MOST_BETWEEN:
            return None
        inside.add(name)
        ahead += values
    return inside


class _Mover:
    """Makes the nodes between two turns again, on turned values."""

    def __init__(self, view: View) -> None:
        self.view, self.new = view, NewNodes(view.taken)
        self._made: dict[str, str] = {}

    def moved(self, name: str, perm: tuple[int, ...]) -> str:
        """A value, turned by `perm`."""
        if name not in self._made:
            node = self.view.writer(name)
            assert node is not None
            self._made[name] = node.input[0] if is_turn(node) else self._again(node, perm)
        return self._made[name]

    def _again(self, node: onnx.NodeProto, perm: tuple[int, ...]) -> str:
        stem = f"{node.output[0]}_turned"
        if node.op_type == "BatchNormalization":
            return self._normalized(node, perm, stem)
        inputs = [self._input(n, perm) if n else "" for n in node.input]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = copy.output[0] = self.new.name(stem)
        copy.input[:] = inputs
        self.new.nodes.append(copy)
        return str(copy.output[0])

    def _input(self, name: str, perm: tuple[int, ...]) -> str:
        if self.view.scopes[name] != Scope.CONSTANT:
            return self.moved(name, perm)
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
        scaled = self.new.node("Mul", [self.moved(node.input[0], perm), factor], f"{stem}_scaled")
        return self.new.node("Add", [scaled, moved], stem)
