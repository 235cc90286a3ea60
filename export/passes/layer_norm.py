"""A layer normalization before a linear layer, as the layer first and one factor for each row behind it.

`LN(x) W + b = r (x W') + (beta W + b)`, where `W'` is `gamma W` less the mean of its rows, so that it takes the mean
out of `x` as well, and `r = 1 / sqrt(mean(x²) - mean(x)² + epsilon)`. So the layer reads the concatenation that the
rule for sums of products parts. The sum of squares is parted as well: of `[k, q, q - k, q · k]` it is
`2 |k|² + 2 |q|² - 2 k · q + k² · q²`: what is the user's once, what is the target's once, and two products with a
vector for each target.

`mean(x²) - mean(x)²` loses digits where what is normalized is nearly the same number in all places, far from zero. So
two of its values must stand beside their difference: where `k`, `q` and `q - k` are alike they are near zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.linear import Linear, linear_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.parts import Part
from stca.export.passes.rules import Rewrite, View
from stca.export.passes.sums import Match as Sum, SumOfProducts


@dataclass(frozen=True)
class Match:
    """`linear` reads what `norm` makes of `[..., width]`; `parted` is the layer, reading what is normalized."""

    linear: Linear
    norm: onnx.NodeProto
    parted: Sum
    width: int


class LayerBeforeNorm:
    """Normalize behind a linear layer and not before it."""

    name = "layer before its normalization"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of a normalized value of the target's that is made from values with fewer rows."""
        linear = linear_at(view, node)
        norm = view.writer(linear.x) if linear and view.scopes[linear.x] == Scope.TARGET else None
        if linear is None or norm is None or norm.domain or norm.op_type != "LayerNormalization":
            return None
        x, shape = norm.input[0], view.sizes.shape(norm.input[0])
        last = shape and attribute(norm, "axis", -1) % len(shape) == len(shape) - 1
        if not shape or not last or any(view.scopes[n] != Scope.CONSTANT for n in norm.input[1:]):
            return None
        parted = SumOfProducts().of(view, replace(linear, x=x))
        return Match(linear, norm, parted, shape[-1]) if parted else None

    def check(self, view: View, match: Match) -> str | None:
        """Only where the layer is parted then, and squares of the parts are sums of products too."""
        for name in match.norm.output:
            if name and (view.is_output(name) or len(view.readers(name)) > (name == match.linear.x)):
                return f"{name!r} has other readers"
        parts = match.parted.parting.parts
        ranges = {(p.start, p.width) for p in parts}
        ranks = {len(match.parted.parting.shape_of(n) or ()) for p in parts for n in (p.value, p.times) if n}
        alike = ranks == {len(match.parted.parting.shape)} and sum(width for _, width in ranges) == match.width
        if any(p.after for p in parts) or not alike:
            return "what it normalizes is not made of plain parts"
        if not _spread(parts):
            return "what it normalizes may be nearly constant, where a sum of squares loses digits"
        if not all(p.times is not None or match.parted.parting.light(p) for p in parts):
            return "a part of what it normalizes has as many rows as the whole"
        return SumOfProducts().check(view, match.parted)

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """The layer, the mean and the sum of squares, then the factor."""
        new, linear, x = NewNodes(view.taken), match.linear, match.norm.input[0]
        kind = onnx.helper.tensor_dtype_to_np_dtype(view.sizes.element_type(x))
        make = _Maker(view, new, linear.out, kind)
        weight = linear.upright(new)
        gamma, beta = match.norm.input[1], match.norm.input[2] if len(match.norm.input) > 2 else ""
        scaled = make("Mul", weight, make("Unsqueeze", gamma, new.integers([1])))
        centred = make("Sub", scaled, make("ReduceMean", scaled, new.integers([0])))
        layer = make("MatMul", x, centred)
        total = make("MatMul", x, make.number(np.ones((match.width, 1))))
        # Without the axis of size 1, over which an engine goes number by number.
        flat = (make("Squeeze", n, new.integers([-1])) for n in (_squares(match, make), total))
        squares, mean = (make("Div", n, make.number(match.width)) for n in flat)
        variance = make("Sub", squares, make("Mul", mean, mean))
        above = make("Add", make("Relu", variance), make.number(attribute(match.norm, "epsilon", 1e-5)))
        factor = make("Unsqueeze", make("Reciprocal", make("Sqrt", above)), new.integers([-1]))
        bias = make("MatMul", beta, weight) if beta else ""
        bias = make("Add", bias, linear.bias) if bias and linear.bias else bias or linear.bias
        made = make("Mul", layer, factor)
        if bias:
            make("Add", made, bias)
        new.last_makes(linear.out)
        return Rewrite(new.nodes, new.weights)


def _spread(parts: Sequence[Part]) -> bool:
    """Whether two of the values stand beside their difference, so that all can be alike near zero alone."""
    plain = dict[int, list[Part]]()
    for part in parts:
        plain.setdefault(part.start, []).append(part)
    alone = {found[0].value for found in plain.values() if len(found) == 1 and found[0].times is None}
    return any(
        len(found) == 2
        and found[0].sign != found[1].sign
        and all(part.times is None and part.value in alone for part in found)
        for found in plain.values()
    )


class _Maker:
    """Nodes of one rewrite, named after the value that it makes."""

    def __init__(self, view: View, new: NewNodes, stem: str, kind: np.dtype[Any]) -> None:
        self.view, self.new, self.stem, self.kind = view, new, stem, kind

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.new.node(op, inputs, f"{self.stem}_{op.lower()}", **attributes)

    def of_all(self, op: str, names: Sequence[str]) -> str:
        """All of them added up, or multiplied."""
        return reduce(lambda a, b: self(op, a, b), names)

    def number(self, values: object) -> str:
        array = np.asarray(values, self.kind)
        return self.new.node("Constant", [], f"{self.stem}_number", value=numpy_helper.from_array(array))


def _squares(match: Match, make: _Maker) -> str:
    """The sum of squares of each row, `[..., 1]`: products of two parts, those with the same long factors in one."""
    parting, found = match.parted.parting, dict[tuple[int, tuple[str, ...]], list[str]]()
    for first, second in combinations_with_replacement(parting.parts, 2):
        if first.start == second.start:
            factors = [n for part in (first, second) for n in (part.value, part.times) if n]
            many = tuple(sorted(n for n in factors if (parting.shape_of(n) or (1, 1))[-2] > 1))
            signs = first.sign * second.sign * (1 if first is second else 2)
            ones = [n for n in factors if n not in many]
            if signs != 1 or not ones:
                ones.append(make.number(np.full((*[1] * (len(parting.shape) - 1), first.width), signs)))
            found.setdefault((first.width, many), []).append(make.of_all("Mul", ones))
    sums = []
    for (_, many), ones in sorted(found.items()):
        one = make.of_all("Add", ones)  # [..., 1, width]
        if many:
            sums.append(make("Einsum", make.of_all("Mul", many), one, equation="...lw,...ow->...lo"))
        else:
            sums.append(make("ReduceSum", one, make.new.integers([-1]), keepdims=1))
    return make.of_all("Add", sums)
