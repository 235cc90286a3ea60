"""A linear layer of an activation with a linear part, which joins the product before: PReLU, Dice.

`PReLU(h) W = ReLU(h) (1 - s) W + h s W`, and where `h = k M` is a history's product with a matrix of each target, as
the first layer of an attention unit is, `h s W` is `k (M s W)`: a product with a matrix as narrow as the second layer.
A PReLU takes a branch for each element of `h`, a ReLU none, and `h` is the largest value there is. Before a
narrow layer, as the last one of such a unit, `h s W` is cheap as it stands.

So with what a gate mixes, `h (a + b p)` in any spelling: Dice (arXiv 1706.06978) is `s h (1 - p) + h p` with
`p = sigmoid(BN(h))`, five passes over `h` beside `p`. Of it `(h p) b W + h a W` leaves one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.scope import Scope
from stca.export.passes.flat_rows import move_rows, rows_moved
from stca.export.passes.linear import MOVED, STARTED, Linear, linear_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View

# What a PReLU takes beyond a ReLU, in elements moved: 5 to 13 times as long on ONNX Runtime's CPU.
_BRANCHED: Final = 3
# Terms of an activation that is multiplied out: a gate has a handful.
_MOST: Final = 16
_DEEPEST: Final = 8

# Constants whose product is added, or subtracted where the sign is -1; none of them is a one.
Coefficient: TypeAlias = list[tuple[int, tuple[str, ...]]]


@dataclass(frozen=True)
class Activation:
    """`bent · (a + …)`: an activation of `h` as `bent by_bent + h by_h`, in numbers of each feature.

    Attributes:
        h: what it is of.
        gate: what `h` is multiplied with to be bent; empty where a ReLU bends it.
        by_h, by_bent: their coefficients.
        saved: passes over `h` that it takes beside bending.
    """

    h: str
    gate: str
    by_h: Coefficient
    by_bent: Coefficient
    saved: int


@dataclass(frozen=True)
class Match:
    """`linear` of an activation of `h`, where `h` is what `product` makes, if it is such a one; sizes are nominal."""

    linear: Linear
    activation: Activation
    product: onnx.NodeProto | None
    hidden: tuple[int, ...]
    outputs: int


class SlopeApart:
    """Take the linear part of an activation to the product before it."""

    name = "slope apart"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of an activation of a target's value, of a product with a matrix for each target perhaps."""
        linear = linear_at(view, node)
        found = _activation(view, linear.x) if linear and view.scopes[linear.x] == Scope.TARGET else None
        if linear is None or found is None:
            return None
        moved = rows_moved(view, found.h)
        made = moved.input[0] if moved is not None else found.h
        product, hidden = view.writer(made), view.sizes.shape(made)
        if hidden is None or len(hidden) < 2 or view.scopes[made] != Scope.TARGET:
            return None
        if product is not None and (len(hidden) < 3 or not _for_each_target(view, product)):
            product = None
        inner, outputs = linear.sizes(view)
        return Match(linear, found, product, hidden, outputs) if hidden[-1] == inner else None  # not broadcast

    def check(self, view: View, match: Match) -> str | None:
        """Only where the slope is a weight of each feature at most, and it is less work."""
        if why := view.others_read(match.linear.x):
            return why
        for name in {n for _, names in (*match.activation.by_h, *match.activation.by_bent) for n in names}:
            shape = view.sizes.shape(name)
            if shape is None or view.scopes[name] != Scope.CONSTANT or math.prod(shape) != math.prod(shape[-1:]):
                return "its slope is no weight of each feature"
        inner, matrix = match.hidden[-1], 0
        rows, n = math.prod(match.hidden[:-1]), match.outputs
        if match.product is not None:
            inner = (view.sizes.shape(match.product.input[0]) or (1,))[-1]
            matrix = 2 * math.prod(view.sizes.shape(match.product.input[1]) or (0,)) * n
        before = rows * match.hidden[-1] * match.activation.saved * MOVED
        after = rows * n * (2 * inner + MOVED) + matrix + 4 * STARTED
        return None if after < before else f"apart its products take {after:.3g} operations, and save {before:.3g}"

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """Both products and their sum."""
        new, linear, activation = NewNodes(view.taken), match.linear, match.activation
        weight = linear.upright(new)
        sloped, bent = (
            new.node("Mul", [weight, _column(view, new, of, linear)], f"{linear.out}_{name}")
            for name, of in (("sloped", activation.by_h), ("bent", activation.by_bent))
        )
        value, narrow = activation.h, sloped
        if match.product is not None:
            value, matrix = match.product.input
            narrow = new.node("MatMul", [matrix, sloped], f"{linear.out}_matrix")
        straight = new.node("MatMul", [value, narrow], f"{linear.out}_straight")
        moved = rows_moved(view, activation.h)
        if match.product is not None and moved is not None:
            straight = move_rows(new, moved, straight, match.outputs, f"{linear.out}_moved")
        if activation.gate:
            curve = new.node("Mul", [activation.h, activation.gate], f"{linear.out}_gated")
        else:
            curve = new.node("Relu", [activation.h], f"{linear.out}_positive")
        total = new.node("MatMul", [curve, bent], f"{linear.out}_kinked")
        if linear.bias:
            total = new.node("Add", [total, linear.bias], f"{linear.out}_kinked")
        new.node("Add", [total, straight], f"{linear.out}_sum")
        new.last_makes(linear.out)
        return Rewrite(new.nodes, new.weights)


def _activation(view: View, name: str) -> Activation | None:
    """The activation that makes a value, where it has a linear part."""
    node = view.writer(name)
    if node is None or node.domain:
        return None
    if node.op_type == "PRelu":
        h, slope = node.input
        return Activation(h, "", [(1, (slope,))], [(1, ()), (-1, (slope,))], _BRANCHED)
    terms, passes = _terms(view, name)
    mixed = next((atoms for atoms in terms if len(atoms) == 2), ())
    h = next((n for n in mixed if (n,) in terms), "")
    gate = next((n for n in mixed if n != h), "")
    if not h or not gate or set(terms) != {(h,), mixed}:
        return None
    return Activation(h, gate, terms[h,], terms[mixed], passes - 1)


def _terms(view: View, name: str, depth: int = 0) -> tuple[Mapping[tuple[str, ...], Coefficient], int]:
    """A value multiplied out: the coefficient of each product of values that it is a sum of, and passes it takes.

    What several nodes read is not looked into: it would be made twice, and `h` is such a value.
    """
    node = view.writer(name)
    if view.scopes[name] == Scope.CONSTANT:
        array = view.constant(name)
        one = array is not None and array.size == 1 and array.item() == 1
        return {(): [(1, () if one else (name,))]}, 0
    kind = node.op_type if node is not None and not node.domain else ""
    if node is None or kind not in ("Add", "Sub", "Mul") or depth == _DEEPEST or _is_shared(view, name):
        return {(name,): [(1, ())]}, 0
    (first, before), (second, after) = (_terms(view, n, depth + 1) for n in node.input)
    found: dict[tuple[str, ...], Coefficient] = {}
    if kind == "Mul":
        for (a, of_a), (b, of_b) in ((x, y) for x in first.items() for y in second.items()):
            products = [(s * t, (*x, *y)) for s, x in of_a for t, y in of_b]
            found.setdefault(tuple(sorted((*a, *b))), []).extend(products)
    else:
        sign = -1 if kind == "Sub" else 1
        for atoms, terms in (*first.items(), *((b, [(sign * s, x) for s, x in of]) for b, of in second.items())):
            found.setdefault(atoms, []).extend(terms)
    if sum(map(len, found.values())) > _MOST:
        return {(name,): [(1, ())]}, 0
    return found, before + after + 1


def _is_shared(view: View, name: str) -> bool:
    return len({reader.output[0] for reader in view.readers(name)}) > 1


def _column(view: View, new: NewNodes, coefficient: Coefficient, linear: Linear) -> str:
    """A coefficient as `[K, 1]`, or `[1, 1]` where it is the same for all features."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(view.sizes.element_type(linear.weight))
    total, stem = "", f"{linear.out}_slope"
    for sign, names in sorted(coefficient, key=lambda term: -term[0]):
        made = ""
        for name in names:
            flat = new.node("Reshape", [name, new.integers([-1, 1])], stem)
            made = new.node("Mul", [made, flat], stem) if made else flat
        made = made or new.node("Constant", [], stem, value=numpy_helper.from_array(np.ones((1, 1), kind)))
        if total:
            total = new.node("Add" if sign == 1 else "Sub", [total, made], stem)
        else:
            total = made if sign == 1 else new.node("Neg", [made], stem)
    return total


def _for_each_target(view: View, node: onnx.NodeProto) -> bool:
    """Whether a node is a product of a user's value with a matrix for each target."""
    if node.domain or node.op_type != "MatMul":
        return False
    value, matrix = (view.scopes[name] for name in node.input)
    return value < Scope.TARGET == matrix
