"""A linear layer over rows that were put into one axis, as the same layer before that.

`flatten(x) W = flatten(x W)`: attention units are often written for `[N · L, K]`, which `x [N, L, K]` is reshaped to.
Before it, the layer reads the concatenation that the rule for sums of products parts.
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
    """`linear` reads `inner [..., K]` as `[rows, K]`, and makes `outputs` columns."""

    linear: Linear
    inner: str
    outputs: int


def unflattened(view: View, name: str) -> str | None:
    """The value `[..., K]` that `name [rows, K]` is with all rows in one axis; None where it is no such value."""
    node = view.writer(name)
    if node is None or node.domain or node.op_type != "Reshape":
        return None
    inner, flat = view.sizes.shape(node.input[0]), view.sizes.shape(name)
    rows = inner and flat and len(inner) > 2 and len(flat) == 2 and flat == (math.prod(inner[:-1]), inner[-1])
    return str(node.input[0]) if rows else None


class RowsKept:
    """Put rows into one axis after a layer and not before."""

    name = "rows kept"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of flattened rows that are made from values with fewer rows."""
        linear = linear_at(view, node)
        inner = unflattened(view, linear.x) if linear and view.scopes[linear.x] == Scope.TARGET else None
        if linear is None or inner is None:
            return None
        outputs = (view.sizes.shape(linear.weight) or (0, 0))[0 if linear.turned else 1]
        parting = Parting(view, inner, outputs)
        parted = len(parting.parts) > 1 and any(map(parting.light, parting.parts))
        return Match(linear, inner, outputs) if parted else None

    def check(self, view: View, match: Match) -> str | None:
        """Always: a layer takes the rows of any number of axes."""
        return None

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The layer, then the Reshape."""
        new, linear = NewNodes(view.taken), match.linear
        weight = linear.weight
        if linear.turned:
            weight = new.node("Transpose", [weight], f"{linear.out}_turned", perm=[1, 0])
        made = new.node("MatMul", [match.inner, weight], f"{linear.out}_product")
        if linear.bias:
            made = new.node("Add", [made, linear.bias], f"{linear.out}_rows")
        new.node("Reshape", [made, new.integers([-1, match.outputs])], f"{linear.out}_flat")
        new.last_makes(linear.out)
        return Rewrite(new.nodes, new.weights)
