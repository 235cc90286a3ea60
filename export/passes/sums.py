"""A linear layer over a concatenation, as a sum of products: what is the user's is multiplied once, not per target.

`[u, t] W = u W_u + t W_t`, so a user's `u` is multiplied before it is repeated for each target, and the sum repeats it.
Differences go with it: `[k, q, q - k] W = k (W_1 - W_3) + q (W_2 + W_3)`. A product of a user's value with a factor of
each target, the `q · k` of DIN's scorer, stays a product per target, but the factor goes to the weight, which is
smaller than a history: `(q · k) W_4 = k (q · W_4)`. Then what else is of `k` or of one row per target goes to that
weight too: DIN's whole layer is `[k, 1] [q · W_4 + W_1 - W_3; q (W_2 + W_3) + b]`, a single product per target.

Rows of the weight are cut off in the graph: its initializers stay the model's own, so that new weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from stca.export.analysis.scope import Scope, attribute
from stca.export.passes.linear import MOVED, STARTED, Linear, linear_at, product_at
from stca.export.passes.nodes import NewNodes
from stca.export.passes.parts import Part, Parting
from stca.export.passes.rules import Rewrite, View


@dataclass(frozen=True)
class _Group:
    """Parts that are multiplied at once: each value has one or more places in the input."""

    values: dict[str, list[Part]]

    @property
    def first(self) -> Part:
        return next(iter(self.values.values()))[0]

    @property
    def width(self) -> int:
        return sum(parts[0].width for parts in self.values.values())


@dataclass(frozen=True)
class Match:
    """A linear layer and the groups of its input's parts, smallest rows first; `why` not, where that is known."""

    linear: Linear
    parting: Parting
    groups: tuple[_Group, ...]
    outputs: int
    why: str | None = None

    def rows(self, group: _Group) -> tuple[int, ...]:
        return self.parting.rows(group.first)

    def role(self, group: _Group) -> Literal["term", "weight", "column"]:
        """What a group is to the last one's product, where that has a weight for each target: its weight or a column.

        A group of the same value adds its weight there. One row for each target is one more row of that weight, whose
        column in the value is all ones. Every other group is a term of the sum.
        """
        main = self.groups[-1].first
        if main.times is None or group is self.groups[-1] or group.first.times is not None:
            return "term"
        if not group.first.after and group.values.keys() == self.groups[-1].values.keys():
            return "weight"
        return "column" if self.rows(group) == (self.parting.shape_of(main.times) or ())[:-1] else "term"


class SumOfProducts:
    """Part a linear layer over a concatenation by scope."""

    name = "sum of products"

    def pattern(self, view: View, node: onnx.NodeProto) -> Match | None:
        """A linear layer of a target's input that is made from values with fewer rows than it has."""
        linear = linear_at(view, node)
        return self.of(view, linear) if linear is not None and view.scopes[linear.x] == Scope.TARGET else None

    def of(self, view: View, linear: Linear) -> Match | None:
        """The parts of a layer's input; None where it has none that are lighter than the whole."""
        _, outputs = linear.sizes(view)
        parting = Parting(view, linear.x, outputs)
        if not any(map(parting.light, parting.parts)) or len(parting.parts) < 2:
            return None
        groups = _groups(view, parting)
        rows = [parting.rows(g.first) for g in groups]
        try:
            covered = np.broadcast_shapes(*rows) == parting.shape[:-1]
        except ValueError:
            covered = False
        why = None if covered else f"what {linear.x!r} is made from does not broadcast to its rows"
        return Match(linear, parting, groups, outputs, why)

    def check(self, view: View, match: Match) -> str | None:
        """Only where it is less work for each request, the user's part counted as if none were kept."""
        if match.why:
            return match.why
        before, after = _whole_work(view, match), _parted_work(view, match)
        if after < before:
            return None
        return f"in parts it takes as much as {after:.3g} operations, whole {before:.3g}"

    def rewrite(self, view: View, match: Match) -> Rewrite:
        """A product a group, then their sum, the smallest first."""
        made = _Writer(view, match)
        made.write()
        return Rewrite(made.new.nodes, made.new.weights)


def _groups(view: View, parting: Parting) -> tuple[_Group, ...]:
    found: dict[tuple[object, ...], _Group] = {}
    for part in parting.parts:
        shape = parting.shape_of(part.value) or ()
        # Sizes that only happen to be the same are told apart by name; those of whole rows are the same.
        dims = (view.sizes.dims(part.value) or ())[:-1] if shape[:-1] != parting.shape[:-1] else None
        key = (*part.group, view.scopes[part.value], shape[:-1], dims, part.times and part.value)
        found.setdefault(key, _Group({})).values.setdefault(part.value, []).append(part)
    return tuple(sorted(found.values(), key=lambda g: (g.first.times is not None, math.prod(parting.rows(g.first)))))


def _whole_work(view: View, match: Match) -> int:
    elements, share = math.prod(match.parting.shape), _share(view, match.linear.x)
    return round(elements * (2 * match.outputs + MOVED * share) + STARTED * (1 + share))


def _share(view: View, x: str) -> float:
    """What one layer answers for of the concatenation it reads: nothing where that goes on for another reader."""
    readers = view.readers(x)
    return 1 / len(readers) if all(product_at(view, node) for node in readers) else 0


def _parted_work(view: View, match: Match) -> int:
    n, shape_of, share = match.outputs, match.parting.shape_of, _share(view, match.linear.x) or 1
    work, sums = 0.0, tuple[int, ...]()
    for group in match.groups:
        role, first, rows = match.role(group), group.first, match.rows(group)
        values, moved = math.prod((shape_of(first.value) or ())[:-1]), 0.0
        if first.times is not None:
            work += 2 * math.prod(rows) * group.width * n
            moved += 2 * math.prod((shape_of(first.times) or ())[:-1]) * group.width * n
        elif role != "weight":
            work += 2 * values * group.width * n
            moved += values * group.width * share * (len(group.values) > 1)
        moved += sum(math.prod(rows) * n for node in first.after if node.op_type == "Gather")
        if role == "term":
            added = np.broadcast_shapes(sums, rows)
            in_product = len(match.parting.shape) == 2 and group is match.groups[-1]  # a Gemm adds
            moved += math.prod(added) * n * bool(sums and not in_product)
            sums = added
        work += MOVED * moved + STARTED * (1 + len(first.after) + share * (len(group.values) > 1))
    return round(work)


class _Writer:
    """The nodes of one sum of products."""

    def __init__(self, view: View, match: Match) -> None:
        self.view, self.match = view, match
        self.new = NewNodes(view.taken)
        self.stem = match.linear.out
        self._cut: dict[tuple[int, int], str] = {}
        self._whole = ""

    def write(self) -> None:
        *some, last = self.match.groups
        by_role: dict[str, list[_Group]] = {"term": [], "weight": [], "column": []}
        for group in some:
            by_role[self.match.role(group)].append(group)
        bias = self.match.linear.bias
        column = self._sum(by_role["column"], bias)
        total = self._sum(by_role["term"], "" if column else bias) or ("" if column else bias)
        if last.first.times is not None:
            self._add(self._mixed(last, by_role["weight"], column), total)
        elif len(self.match.parting.shape) == 2 and not last.first.after:
            inputs = [self._value(last), self._weight(last), *([total] * bool(total))]
            self.new.node("Gemm", inputs, f"{self.stem}_sum")
        else:
            self._add(self._product(last), total)
        self.new.last_makes(self.match.linear.out)

    def _sum(self, groups: Sequence[_Group], bias: str) -> str:
        """The products of these groups, with the bias added to the first; empty where there are none."""
        total = ""
        for group in groups:
            total, bias = self._add(self._add(total, self._product(group)), bias), ""
        return total

    def _add(self, a: str, b: str) -> str:
        return self.new.node("Add", [a, b], f"{self.stem}_sum") if a and b else a or b

    def _product(self, group: _Group) -> str:
        if group.first.times is not None:
            return self._mixed(group, [], "")
        made = self.new.node("MatMul", [self._value(group), self._weight(group)], f"{self.stem}_part")
        for node in group.first.after:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[0], copy.output[0] = made, self.new.name(f"{self.stem}_part")
            copy.name = made = copy.output[0]
            self.new.nodes.append(copy)
        return made

    def _mixed(self, group: _Group, alike: Sequence[_Group], column: str) -> str:
        """`(q · k) W` as `k (q · W)`, in the same product with the weights of `k` alone and of a column of ones."""
        (value,) = group.values
        weight = ""
        for part in group.values[value]:
            rank = len(self.match.parting.shape_of(part.times or "") or ())
            perm = [*range(rank - 2), rank - 1, rank - 2]
            factor = self.new.node("Transpose", [part.times or ""], f"{self.stem}_factor", perm=perm)
            weight = self._add(weight, self.new.node("Mul", [factor, self._rows([part])], f"{self.stem}_weight"))
        for other in alike:
            weight = self._add(weight, self._weight(other))
        if column:
            rank = len(self.match.parting.shape_of(value) or ())
            pads = self.new.integers([0] * (2 * rank - 1) + [1])
            kind = onnx.helper.tensor_dtype_to_np_dtype(self.view.sizes.element_type(value))
            value = self.new.node("Pad", [value, pads, self._one(kind)], f"{value}_ones")
            weight = self.new.node("Concat", [weight, column], f"{self.stem}_weight", axis=-2)
        return self.new.node("MatMul", [value, weight], f"{self.stem}_part")

    def _one(self, kind: Any) -> str:
        return self.new.node("Constant", [], "one", value=numpy_helper.from_array(np.ones((), kind)))

    def _value(self, group: _Group) -> str:
        """The values of a group, concatenated; a Concat that the graph has already is used again."""
        names = list(group.values)
        if len(names) == 1:
            return names[0]
        for node in self.view.readers(names[0]):
            if node.op_type == "Concat" and list(node.input) == names and self._is_before(node):
                rank = len(self.match.parting.shape_of(names[0]) or ())
                if attribute(node, "axis", 0) % rank == rank - 1:
                    return str(node.output[0])
        return self.new.node("Concat", names, f"{self.match.linear.x}_part", axis=-1)

    def _is_before(self, node: onnx.NodeProto) -> bool:
        return self.view.flow.writer[node.output[0]] < self.view.flow.writer[self.match.linear.out]

    # Rows of the weight

    def _weight(self, group: _Group) -> str:
        runs = list(group.values.values())
        starts = [parts[0].start for parts in runs]
        ends = [parts[0].start + parts[0].width for parts in runs]
        if all(len(parts) == 1 and parts[0].sign == 1 for parts in runs) and starts[1:] == ends[:-1]:
            return self._slice(starts[0], ends[-1])
        rows = [self._rows(parts) for parts in runs]
        return rows[0] if len(rows) == 1 else self.new.node("Concat", rows, f"{self.stem}_weight", axis=0)

    def _rows(self, parts: Sequence[Part]) -> str:
        """The rows that one value meets, added up by the signs of its places."""
        by_sign = {s: [p for p in parts if p.sign == s] for s in (1, -1)}
        plus, minus = ("" for _ in range(2))
        for part in by_sign[1]:
            plus = self._add(plus, self._slice(part.start, part.start + part.width))
        for part in by_sign[-1]:
            minus = self._add(minus, self._slice(part.start, part.start + part.width))
        if not minus:
            return plus
        kind, inputs = ("Sub", [plus, minus]) if plus else ("Neg", [minus])
        return self.new.node(kind, inputs, f"{self.stem}_weight")

    def _slice(self, start: int, end: int) -> str:
        if (start, end) not in self._cut:
            linear = self.match.linear
            self._whole = self._whole or linear.upright(self.new)
            ends = [self.new.integers([n]) for n in (start, end, 0)]
            self._cut[start, end] = self.new.node("Slice", [self._whole, *ends], f"{self.stem}_rows")
        return self._cut[start, end]
