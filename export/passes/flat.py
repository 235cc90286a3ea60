"""Values stacked or concatenated along an inner axis and flattened, as each flattened and then concatenated.

`flatten([u; t]) = [flatten(u), flatten(t)]`: fields in one tensor `[N, fields, width]` that an MLP reads as
`[N, fields · width]`. A user's field that was repeated for each target is flattened before it is repeated, where the
rule for sums of products finds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from stca.export.analysis.scope import attribute
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View


@dataclass(frozen=True)
class Match:
    """`node` flattens, from `axis` on, what `concat` makes along `axis`; `widths` of its inputs, flattened."""

    node: onnx.NodeProto
    concat: onnx.NodeProto
    axis: int
    widths: tuple[int, ...]


class FlatApart:
    """Flatten parts before they are concatenated."""

    name = "flattened apart"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A Reshape or Flatten to the last axis of a Concat, an input of which is repeated from fewer rows."""
        concat = view.writer(node.input[0]) if node.op_type in ("Reshape", "Flatten") and not node.domain else None
        if concat is None or concat.domain or concat.op_type != "Concat":
            return None
        whole, flat = view.sizes.shape(concat.output[0]), view.sizes.shape(node.output[0])
        shapes = [view.sizes.shape(n) for n in concat.input]
        if not whole or flat is None or None in shapes:
            return None
        axis = attribute(concat, "axis", 0) % len(whole)
        inner = 0 < axis < len(whole) - 1 and flat == (*whole[:axis], math.prod(whole[axis:]))
        if not inner or not any(_repeated(view, n, axis) for n in concat.input):
            return None
        return Match(node, concat, axis, tuple(math.prod(s[axis:]) for s in shapes if s))

    def check(self, view: View, match: Match) -> str | None:
        """Only where the flattened sizes are the same in every request."""
        for name in match.concat.input:
            dims = (view.sizes.dims(name) or ())[match.axis :]
            if not all(isinstance(n, int) for n in dims):
                return f"{name!r} is of any size there"
        return None

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """Each input flattened; what was repeated is repeated afterwards."""
        new, parts = NewNodes(view.taken), []
        for name, width in zip(match.concat.input, match.widths, strict=True):
            shape = new.integers([0] * match.axis + [width])
            repeat = _repeated(view, name, match.axis)
            flat = new.node("Reshape", [repeat.input[0] if repeat else name, shape], f"{name}_flat")
            if repeat:
                rows = new.node(
                    "Slice", [repeat.input[1], new.integers([0]), new.integers([match.axis])], f"{name}_rows"
                )
                sizes = new.node("Concat", [rows, new.integers([1])], f"{name}_sizes", axis=0)
                flat = new.node("Expand", [flat, sizes], f"{name}_repeated")
            parts.append(flat)
        new.node("Concat", parts, f"{match.node.output[0]}_flat", axis=-1)
        new.last_makes(match.node.output[0])
        return Rewrite(new.nodes, new.weights)


def _repeated(view: View, name: str, axis: int) -> onnx.NodeProto | None:
    """The Expand that makes a value by repeating its rows alone, those before `axis`; None where there is none."""
    node = view.writer(name)
    if node is None or node.domain or node.op_type != "Expand":
        return None
    inner, outer, sizes = (view.sizes.shape(n) for n in (node.input[0], name, node.input[1]))
    fits = inner and outer and len(inner) == len(outer) and inner[axis:] == outer[axis:] and sizes == (len(outer),)
    return node if fits and inner != outer else None
