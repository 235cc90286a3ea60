"""A Fourier transform as a product with its matrix.

`X_k = Σ_n x_n exp(∓2πi nk / N)` is linear, and real and imaginary parts lie side by side in ONNX: so `DFT` is a matrix
of cosines and sines. It is made in the graph, in float32, which has every integer up to the longest length exactly;
where the length is fixed an engine folds it when it loads. ONNX Runtime's own transform loses 1e-2 at a length of 1000
and takes 11 times as long as the product; of a power of two it takes about as long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.layout import Layout, Tried
from stca.export.analysis.scope import attribute, opset_of
from stca.export.passes.nodes import NewNodes
from stca.export.passes.rules import Rewrite, View

# Beyond it the matrix takes more than 16 MB, and the product longer than a transform of a power of two.
_LONGEST: Final = 2048
# Of the types that ONNX transforms, those that have every place up to there, and sines of it to more than three digits.
_EXACT: Final = frozenset((onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE))


@dataclass(frozen=True)
class Match:
    """A transform as it is in a small run.

    Attributes:
        node: the `DFT`.
        axis: that is transformed, not negative.
        length: N in this run.
        read, made: shapes of its input and output in this run.
        fixed: whether another run has the same length, and as many values along the axis.
        nominal: N of a nominal request; None where it is not known.
    """

    node: onnx.NodeProto
    axis: int
    length: int
    read: tuple[int, ...]
    made: tuple[int, ...]
    fixed: bool = False
    nominal: int | None = None

    @property
    def given(self) -> str:
        """The value that says N; empty where it follows from what is read."""
        return self.node.input[1] if len(self.node.input) > 1 else ""

    @property
    def most(self) -> int:
        """How many values along the axis count in this run; ONNX leaves out those behind them."""
        return self.length // 2 + 1 if self.inverse and self.halved else self.length

    @property
    def inverse(self) -> bool:
        """Whether spectra are read and not made."""
        return bool(attribute(self.node, "inverse", 0))

    @property
    def halved(self) -> bool:
        """Whether the half that is left out is the other's mirror image."""
        return bool(attribute(self.node, "onesided", 0))


class SpectrumAsProduct:
    """Write a Fourier transform as a product."""

    name = "spectrum as a product"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A `DFT`, of any kind, that runs."""
        if node.op_type != "DFT" or node.domain:
            return None
        try:
            first, second = (_seen(view, node, run) for run in view.tried)
        except Layout:
            return None
        fixed = first.length == second.length and first.read[first.axis] == second.read[second.axis]
        nominal: int | None = first.length
        if first.length != second.length:
            shapes = [view.sizes.shape(name) for name in (node.input[0], node.output[0])]
            nominal = max((shape[first.axis] for shape in shapes if shape is not None), default=None)
        return replace(first, fixed=fixed, nominal=nominal)

    def check(self, view: View, match: Match) -> str | None:
        """Only where the matrix is exact enough, and not large."""
        if view.sizes.element_type(match.node.input[0]) not in _EXACT:
            return "its numbers are neither float32 nor float64"
        if match.nominal is None:
            return "its length is not known"
        if match.nominal > _LONGEST:
            return f"its length is {match.nominal}, more than {_LONGEST}"
        return None

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The axis moved beside its parts, both as one row, times the matrix, and back."""
        new, out = NewNodes(view.taken), match.node.output[0]
        rank, axis = len(match.read), match.axis
        moved = [*(i for i in range(rank) if i not in (axis, rank - 1)), axis, rank - 1]
        x = _counting(new, match)
        matrix = _Matrix(new, view, match, x).made
        if moved != sorted(moved):
            x = new.node("Transpose", [x], f"{out}_moved", perm=moved)
        width = min(match.read[axis], match.most) * match.read[-1] if match.fixed else -1
        rows = new.node("Reshape", [x, new.integers([0] * (rank - 2) + [width])], f"{out}_rows")
        product = new.node("MatMul", [rows, matrix], f"{out}_product")
        parts = [match.made[axis] if match.fixed else -1, match.made[-1]]
        new.node("Reshape", [product, new.integers([0] * (rank - 2) + parts)], f"{out}_parts")
        if moved != sorted(moved):
            back = [moved.index(i) for i in range(rank)]
            new.node("Transpose", [new.nodes[-1].output[0]], f"{out}_back", perm=back)
        new.last_makes(out)
        return Rewrite(new.nodes, new.weights)


def _seen(view: View, node: onnx.NodeProto, run: Tried) -> Match:
    """A transform in a run; its axis is an attribute before opset 20, and an input from there on."""
    read, made = run.shape(node.input[0]), run.shape(node.output[0])
    given = [int(np.ravel(run.values[name])[0]) if name else None for name in (*node.input[1:], "", "")]
    opset = opset_of(view.model)
    axis = (attribute(node, "axis", 1 if opset < 20 else -2) if given[1] is None else given[1]) % len(read)
    whole = made[axis] if attribute(node, "inverse", 0) else read[axis]
    return Match(node, axis, whole if given[0] is None else given[0], read, made)


def _counting(new: NewNodes, match: Match) -> str:
    """What a transform reads, without the values behind its length."""
    x: str = match.node.input[0]
    stem = f"{match.node.output[0]}_counting"
    if match.read[match.axis] <= match.most if match.fixed else not match.given:
        return x
    end = new.integers([match.most])
    if not match.fixed:
        end = new.node("Reshape", [match.given, new.integers([1])], f"{stem}_length")
        if match.inverse and match.halved:
            half = new.node("Div", [end, new.integers([2])], f"{stem}_half")
            end = new.node("Add", [half, new.integers([1])], f"{stem}_most")
    return new.node("Slice", [x, new.integers([0]), end, new.integers([match.axis])], stem)


class _Matrix:
    """The matrix `[n · parts, k · parts]` of a transform, as nodes; it is multiplied with `x`.

    Attributes:
        made: its name.
    """

    def __init__(self, new: NewNodes, view: View, match: Match, x: str) -> None:
        self._new, self._match, self._x, self._stem = new, match, x, match.node.output[0]
        self._type = view.sizes.element_type(match.node.input[0])
        parts_read, parts_made = match.read[-1], match.made[-1]
        read, made, length = self._counts()
        cosine, sine = self._waves(read, made, length)
        minus = self._node("Neg", sine)
        plus, minus = (sine, minus) if match.inverse else (minus, sine)
        real, imaginary = [cosine, plus][:parts_made], [minus, cosine][:parts_made]
        rows = [self._stacked(part, 2) for part in (real, imaginary)[:parts_read]]
        # Not Flatten, which does not know how wide a matrix without rows is: that of a history without events.
        columns = new.integers([-1, match.made[match.axis] * parts_made])
        if not match.fixed:
            width = self._node("Mul", self._node("Reshape", made, new.integers([1])), new.integers([parts_made]))
            columns = self._node("Concat", new.integers([-1]), width, axis=0)
        self.made = self._node("Reshape", self._stacked(rows, 1), columns)

    def _counts(self) -> tuple[str, str, str]:
        """How many values are read, how many are made, and the transform's length; int64 scalars."""
        match = self._match
        if match.fixed:
            sizes = (min(match.read[match.axis], match.most), match.made[match.axis], match.length)
            read, made, length = (self._new.weight(f"{self._stem}_count", np.array(n)) for n in sizes)
            return read, made, length
        shape = self._node("Shape", self._x)
        read = self._node("Gather", shape, self._new.weight(f"{self._stem}_axis", np.array(match.axis)), axis=0)
        one, two = (self._new.weight(f"{self._stem}_{n}", np.array(n)) for n in (1, 2))
        if match.given:
            length = self._node("Reshape", match.given, self._new.weight(f"{self._stem}_scalar", np.zeros(0, np.int64)))
        elif match.inverse and match.halved:
            length = self._node("Mul", self._node("Sub", read, one), two)
        else:
            length = read
        halves = match.halved and not match.inverse
        return read, self._node("Add", self._node("Div", length, two), one) if halves else length, length

    def _waves(self, read: str, made: str, length: str) -> tuple[str, str]:
        """Cosines and sines `[n, k]` of 2π nk / N, each row by what it counts."""
        # Not Unsqueeze: ONNX's inference follows the numbers through that, as if they were still one row.
        n = self._node("Reshape", self._range(read), self._new.integers([-1, 1]))
        place = self._node("Mod", self._node("Mul", n, self._range(made)), length)
        half_turn = self._node("Acos", self._number(-1))  # π, in whatever precision it runs
        whole, two = self._cast(length), self._number(2)
        turns = self._node("Div", self._cast(place), self._node("Div", whole, two))
        angle = self._node("Mul", turns, half_turn)
        cosine, sine = self._node("Cos", angle), self._node("Sin", angle)
        if not self._match.inverse:
            return cosine, sine
        share = self._number(1)
        if self._match.halved:  # all but the ends stand for their mirror images, too
            twice = self._node("Mod", self._node("Add", n, n), length)
            ends = self._node("Equal", twice, self._new.weight(f"{self._stem}_0", np.array(0)))
            share = self._node("Sub", two, self._cast(ends))
        share = self._node("Div", share, whole)
        return self._node("Mul", cosine, share), self._node("Mul", sine, share)

    def _range(self, count: str) -> str:
        start, step = (self._new.weight(f"{self._stem}_{n}", np.array(n)) for n in (0, 1))
        return self._node("Range", start, count, step)

    def _cast(self, name: str) -> str:
        return self._node("Cast", name, to=self._type)

    def _number(self, value: int) -> str:
        kind = onnx.helper.tensor_dtype_to_np_dtype(self._type)
        return self._node("Constant", value=numpy_helper.from_array(np.array(value, kind)))

    def _stacked(self, values: list[str], axis: int) -> str:
        apart = [self._node("Unsqueeze", name, self._new.integers([axis])) for name in values]
        return apart[0] if len(apart) == 1 else self._node("Concat", *apart, axis=axis)

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self._new.node(kind, inputs, f"{self._stem}_{kind.lower()}", **attributes)
