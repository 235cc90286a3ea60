"""What the input of a linear layer is concatenated, added and repeated from, down to the values that its weight meets.

A layer is linear, so its product can be taken of each such value alone: before a user's value is repeated for each
target, and once for all targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.rules import View

_REPEATS: Final = ("Expand", "Tile")
# Values looked at for one layer: a sum of sums of the same values has as many ways to them as it has subsets.
_MOST: Final = 500


@dataclass(frozen=True)
class Part:
    """A term of an input `x [..., K]`: `sign · value`, times a second factor perhaps, in some of its columns.

    Attributes:
        value: `[..., width]`, broadcast against the other parts.
        start, width: its columns, which are the rows of the weight that it meets.
        sign: 1 or -1.
        times: a factor `[..., 1, width]` of each target, where the term is a product with it.
        after: nodes that the value goes through before it is a part, innermost first; none changes the last axis.
        repeated: whether its rows are repeated on the way.
    """

    value: str
    start: int
    width: int
    sign: int = 1
    times: str | None = None
    after: tuple[onnx.NodeProto, ...] = ()
    repeated: bool = False

    @property
    def group(self) -> tuple[object, ...]:
        """Parts of one group are concatenated: they have the same rows, on the same way."""
        return (self.times is not None, tuple(n.output[0] for n in self.after))


class Parting:
    """The parts of one value.

    Args:
        view: of the graph.
        whole: the value, of known nominal shape.
        outputs: width of the layer that reads it: below it, a factor of each target is better taken to the weight.
    """

    def __init__(self, view: View, whole: str, outputs: int) -> None:
        self._view, self._outputs = view, outputs
        self._left = _MOST
        self.shape = self.shape_of(whole) or ()
        self.parts = self._parts(whole, 0, ()) if self.shape else []

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Nominal shape."""
        return self._view.sizes.shape(name)

    def light(self, part: Part, whole: str | None = None) -> bool:
        """Whether the part has fewer rows than the whole, or than another value it is a part of."""
        rows = (self.shape if whole is None else self.shape_of(whole) or ())[:-1]
        return part.times is None and math.prod((self.shape_of(part.value) or ())[:-1]) < math.prod(rows)

    def rows(self, part: Part) -> tuple[int, ...]:
        """Nominal sizes of its product but for the last axis."""
        if part.after:
            shape = self.shape_of(part.after[-1].output[0]) or ()
            return (1,) * (len(shape) - 1) if part.repeated else shape[:-1]
        names = [part.value] + [part.times] * (part.times is not None)
        return np.broadcast_shapes(*((self.shape_of(n) or ())[:-1] for n in names if n))

    def _parts(self, name: str, start: int, after: tuple[onnx.NodeProto, ...]) -> list[Part]:
        shape = self.shape_of(name)
        assert shape is not None
        itself = Part(name, start, shape[-1], after=after)
        node = self._view.writer(name)
        self._left -= 1
        if node is None or node.domain or len(shape) < 2 or self._left < 0:
            return [itself]
        found = self._through(node, shape, start, after)
        # A way through nodes is gone only to what is lighter than where it begins.
        return found if found and any(p.times is not None or self.light(p, name) for p in found) else [itself]

    def _through(
        self, node: onnx.NodeProto, shape: tuple[int, ...], start: int, after: tuple[onnx.NodeProto, ...]
    ) -> list[Part] | None:
        """The parts of what `node` makes, of known `shape`; None where it parts nothing."""
        kind, read = node.op_type, [n for n in node.input if n]
        shapes = [self.shape_of(n) for n in read]
        if shapes[0] is None or not shapes[0]:
            return None
        inner = shapes[0]
        if kind in (*_REPEATS, "Identity"):
            fits = len(inner) >= 2 and inner[-1] == shape[-1] and (len(inner) == len(shape) or not after)
            if not fits or (kind != "Identity" and any(n.op_type == "Gather" for n in after)):
                return None
            if kind == "Tile" and any(a not in (1, b) for a, b in zip(inner, shape, strict=True)):
                return None
            return [replace(p, repeated=p.repeated or inner != shape) for p in self._parts(read[0], start, after)]
        if self._view.scopes[node.output[0]] <= Scope.USER:
            return None
        if kind == "Concat" and attribute(node, "axis", 0) % len(shape) == len(shape) - 1 and None not in shapes:
            widths = [s[-1] for s in shapes if s]
            starts = np.cumsum([start, *widths[:-1]])
            return [p for n, at in zip(read, starts, strict=True) for p in self._parts(n, int(at), after)]
        if kind in ("Add", "Sub", "Mul"):
            return self._arithmetic(node, shape, start, after)
        if (
            kind == "Gather"
            and attribute(node, "axis", 0) % len(inner) < len(inner) - 1
            and self._view.scopes[read[0]] == Scope.USER
        ):
            return self._parts(read[0], start, (node, *after))
        if self._keeps_last_axis(node, inner, shape):
            return self._parts(read[0], start, (node, *after))
        return None

    def _arithmetic(
        self, node: onnx.NodeProto, shape: tuple[int, ...], start: int, after: tuple[onnx.NodeProto, ...]
    ) -> list[Part] | None:
        """A sum or a difference of light values is parted; a product with a factor of each target keeps both."""
        both = [self.shape_of(n) for n in node.input]
        if any(s is None or len(s) < 2 or s[-1] != shape[-1] or (after and len(s) != len(shape)) for s in both):
            return None
        first, second = (self._parts(n, start, after) for n in node.input)
        if node.op_type != "Mul":
            sign = -1 if node.op_type == "Sub" else 1
            found = [*first, *(replace(p, sign=sign * p.sign) for p in second)]
            return found if all(self.light(p, node.output[0]) for p in found) else None
        if len(first) > 1 or len(second) > 1 or after or shape[-2] <= self._outputs:
            return None
        for factor, value in ((first[0], second[0]), (second[0], first[0])):
            if self._goes_to_weight(factor, value, node.output[0]):
                return [Part(value.value, start, shape[-1], factor.sign * value.sign, factor.value)]
        return None

    def _goes_to_weight(self, factor: Part, value: Part, product: str) -> bool:
        """Whether `factor` has one row for all those of `value`, which has fewer than their product."""
        shapes = [self.shape_of(n) or () for n in (factor.value, value.value, product)]
        one, many, both = (shape[:-1] for shape in shapes)
        fits = len(one) >= len(many) and one[-1] == 1 and many[-1] == both[-1]
        direct = not factor.after and not value.after
        return fits and direct and self.light(value, product) and np.broadcast_shapes(one, many) == both

    def _keeps_last_axis(self, node: onnx.NodeProto, inner: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        if node.op_type == "Transpose":
            perm = attribute(node, "perm", None)
            return perm is not None and perm[-1] == len(perm) - 1
        if node.op_type not in ("Squeeze", "Unsqueeze") or len(node.input) < 2:
            return False
        axes, rank = self._view.constant(node.input[1]), max(len(inner), len(shape))
        return axes is not None and all(a % rank < rank - 1 for a in axes.ravel().tolist())
