"""The weights of an attention, from the mix up to their softmax: in exponentials, guarded, masked again, or as it is.

A factor of the user's between the two is as well taken to the values: `Σ (w m) v = Σ w (m v)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from stca.export.analysis.layout import Places, Tried, before, places, trace
from stca.export.analysis.operators import VIEWS
from stca.export.analysis.scope import Scope, attribute, label
from stca.export.passes.by_hand import softmax_by_hand, why_no_softmax
from stca.export.passes.rules import View

BINARY: Final = frozenset(("Add", "Sub", "Mul", "Div"))
# Nodes between the two products, in a row and in all, beyond which nobody writes attention.
DEEPEST: Final = 40
_MOST: Final = 200
_COMPARISONS: Final = frozenset(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
_PASSING: Final = VIEWS | {"Cast", "Dropout", "Expand", "Identity", "Tile", "Transpose"}


@dataclass(frozen=True)
class Factor:
    """What weights are multiplied by behind the softmax.

    Attributes:
        role: its name among the values of an attention.
        other: source of the factor, or of the condition under which weights stay or become zero.
        places: of it, for each weight that meets a value.
        op: `Mul` or `Where`.
        keeps: whether a Where keeps weights where its condition holds.
    """

    role: str
    other: str
    places: Places
    op: str
    keeps: bool = True


@dataclass
class Weights:
    """The weights that meet the values, in one run.

    Attributes:
        softmax: that they come from.
        places: in its result, of each weight.
        factors: that the values take.
        safe: whether rows that are masked whole are made zero.
    """

    softmax: onnx.NodeProto
    places: Places
    factors: list[Factor] = field(default_factory=list)
    safe: bool = False


def weights_of(view: View, run: Tried, name: str) -> Weights | None:
    """The softmax that `name` is an arrangement of, and what is done on the way; None where there is none."""
    return _Reader(view, run).read(name)


class _Reader:
    def __init__(self, view: View, run: Tried) -> None:
        self.view, self.run, self.flow = view, run, view.flow
        self.factors: list[Factor] = []
        self.guards: list[str] = []  # conditions that find what is no number
        self.safe = False

    def read(self, name: str) -> Weights | None:
        found, on_the_way = places(self.run.shape(name)), list[str]()
        for _ in range(DEEPEST):
            node = self.view.writer(name)
            if node is None or node.domain:
                return None
            on_the_way.append(name)
            if (softmax := _spelled(self.view, node)) is not None:
                given = [*on_the_way, softmax.input[0]]
                told = all(self._tells_no_number(c, given) for c in self.guards)
                return Weights(softmax, found, self.factors, self.safe) if told else None
            if node.op_type == "Cast":
                name = node.input[0]
            elif (step := before(node, self.run)) is not None:
                name, moved = step
                found = moved.ravel()[found]
            elif (inner := self._changed(node, found)) is not None:
                name, found = inner, self._across(inner, node.output[0]).ravel()[found]
            else:
                return None
        return None

    def _changed(self, node: onnx.NodeProto, found: Places) -> str | None:
        """The weights that `node` guards, masks or multiplies; None where it does anything else."""
        if node.op_type == "Mul":
            inner, other = sorted(map(str, node.input), key=lambda n: -self.view.scopes[n])
            return inner if self._is_factor(inner, other, node, found, "Mul") else None
        if node.op_type != "Where":
            return None
        fixed = [str(n) for n in node.input[1:] if len(np.unique(self.run.values[n])) == 1]
        rest = [str(n) for n in node.input[1:] if n not in fixed]
        if len(rest) != 1:
            return None
        zero = not np.any(self.run.values[fixed[0]])
        self.safe = self.safe or zero
        if self.view.scopes[node.input[0]] > Scope.USER:
            self.guards.append(node.input[0])
            return rest[0]
        keeps = node.input[1] == rest[0]
        return rest[0] if zero and self._is_factor(rest[0], node.input[0], node, found, "Where", keeps) else None

    def _is_factor(
        self, inner: str, other: str, node: onnx.NodeProto, found: Places, op: str, keeps: bool = True
    ) -> bool:
        """Whether `other` is the user's, and that of the inner value the target's: it is a factor then."""
        if not self.view.scopes[other] <= Scope.USER < self.view.scopes[inner]:
            return False
        source, moved = trace(self.flow, self.run, other)
        at = moved.ravel()[self._across(other, node.output[0]).ravel()[found]]
        self.factors.append(Factor(f"factor {len(self.factors)}", source, at, op, keeps))
        return True

    def _across(self, name: str, out: str) -> Places:
        """Places in `name` of each element of an elementwise result `out`."""
        return np.broadcast_to(places(self.run.shape(name)), self.run.shape(out))

    def _tells_no_number(self, condition: str, given: Sequence[str]) -> bool:
        """Whether a condition finds what is no number, as in a row that is masked whole, by weights or logits alone."""
        nodes, leaves = self.flow.needed([condition], given=given)
        kinds = {self.view.model.graph.node[i].op_type for i in nodes}
        if kinds & _COMPARISONS and "IsInf" not in kinds:
            return False
        return all(n in given or self.view.scopes[n] == Scope.CONSTANT for n in leaves)


def mixes(view: View, node: onnx.NodeProto) -> bool:
    """Whether a softmax, or what nearly is one, is among the operands of a product, by operators alone."""
    return any(True for _ in _operands(view, node))


def why_not_weights(view: View, node: onnx.NodeProto) -> tuple[str, str] | None:
    """Why exponentials among the operands of a product are no softmax, and which operand has them; None where none."""
    return next(((why, name) for name, why in _operands(view, node) if why), None)


def _operands(view: View, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """The operands of a product that come from a softmax; or nearly so, with the reason why it is none."""
    if node.domain or node.op_type not in ("MatMul", "Gemm", "Einsum", "ReduceSum"):
        return
    names = list(node.input[:2])
    if node.op_type == "ReduceSum":
        inner = view.writer(node.input[0])
        names = list(inner.input) if inner is not None and inner.op_type == "Mul" else []
    for name in names:
        if (why := _softmax_above(view, name)) is not None:
            yield name, why


def _softmax_above(view: View, name: str) -> str | None:
    """Of the softmax among the nearest values that `name` is arranged, scaled or masked from, why it is none; empty
    where it is one, None where there is nothing like it.
    """
    pending, seen = [name], {name}
    while pending and len(seen) < _MOST:
        node = view.writer(name := pending.pop())
        if node is None or node.domain:
            continue
        if _spelled(view, node) is not None:
            return ""
        if (why := why_no_softmax(view, node)) is not None:
            return why
        sums = node.op_type == "Where" or node.op_type in BINARY
        above = [n for n in node.input if view.scopes[n] == view.scopes[name]] if sums else node.input[:1]
        if sums or node.op_type in _PASSING:
            pending += [n for n in above if n not in seen]
            seen.update(above)
    return None


def _spelled(view: View, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Softmax that makes `node`'s result, whether it is one or is spelled in exponentials."""
    if node.domain or node.op_type == "Softmax":
        return None if node.domain else node
    if (found := softmax_by_hand(view, node)) is not None:
        return _as_softmax(found[0], node, found[1])
    above = view.writer(node.input[0]) if node.op_type == "Exp" else None
    if above is None or above.op_type != "LogSoftmax":
        return None
    return _as_softmax(above.input[0], node, attribute(above, "axis", -1))


def _as_softmax(logits: str, node: onnx.NodeProto, axis: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Softmax", [logits], node.output, label(node), axis=axis)
