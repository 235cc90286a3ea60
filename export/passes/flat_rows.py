"""A linear layer over rows that were put into other axes, as the same layer before that.

`view(x) W = view(x W)`: attention units are often written for `[N · L, K]`, which `x [N, L, K]` is reshaped to, or for
`[N, L, 1, K]`, as convolutions over two axes are. Before it, the layer reads the concatenation that the rule for sums
of products parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from stca.export.analysis.scope import Scope
from stca.export.passes.linear import Linear, linear_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.parts import Parting
from stca.export.passes.rules import Rewrite, View


@dataclass(frozen=True)
class Match:
    """`linear` reads what `moved` makes of `[..., K]`, the same rows in other axes; it makes `outputs` columns."""

    linear: Linear
    moved: onnx.NodeProto
    outputs: int


def rows_moved(view: View, name: str) -> onnx.NodeProto | None:
    """The node that makes `name` by putting rows `[..., K]` into one axis or an axis of one more; None for others."""
    node = view.writer(name)
    if node is None or node.domain or node.op_type not in ("Reshape", "Unsqueeze"):
        return None
    inner, moved = view.sizes.shape(node.input[0]), view.sizes.shape(name)
    if not inner or not moved or inner[-1] != moved[-1]:
        return None
    if node.op_type == "Reshape":
        return node if len(inner) > 2 and moved == (math.prod(inner[:-1]), inner[-1]) else None
    axes = view.constant(node.input[1])
    fits = len(inner) > 1 and axes is not None and all(a % len(moved) < len(moved) - 1 for a in axes.ravel().tolist())
    return node if fits else None


def move_rows(new: NewNodes, moved: onnx.NodeProto, made: str, outputs: int, stem: str) -> str:
    """Put the rows of another value, of `outputs` columns, where `moved` puts those of its own."""
    to = new.integers([-1, outputs]) if moved.op_type == "Reshape" else moved.input[1]
    return new.node(moved.op_type, [made, to], stem)


class RowsKept:
    """Put rows into other axes after a layer and not before."""

    name = "rows kept"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of rows that are made from values with fewer rows."""
        linear = linear_at(view, node)
        moved = rows_moved(view, linear.x) if linear and view.scopes[linear.x] == Scope.TARGET else None
        if linear is None or moved is None:
            return None
        _, outputs = linear.sizes(view)
        parting = Parting(view, moved.input[0], outputs)
        parted = len(parting.parts) > 1 and any(map(parting.light, parting.parts))
        return Match(linear, moved, outputs) if parted else None

    def check(self, view: View, match: Match) -> str | None:
        """Always: a layer takes the rows of any number of axes."""
        return None

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The layer, then the view."""
        new, linear = NewNodes(view.taken), match.linear
        made = new.node("MatMul", [match.moved.input[0], linear.upright(new)], f"{linear.out}_product")
        if linear.bias:
            made = new.node("Add", [made, linear.bias], f"{linear.out}_rows")
        move_rows(new, match.moved, made, match.outputs, f"{linear.out}_moved")
        new.last_makes(linear.out)
        return Rewrite(new.nodes, new.weights)
