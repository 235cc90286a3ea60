"""Which integers a graph's inputs may hold: from every place where a value picks rows, back to the inputs.

A value that picks rows of a table with n rows must lie in `[0, n)`. Walked backwards, what a node demands of its result
becomes what it demands of its inputs: of `ids + 1` the ids may be one lower, of `ids % 1000` anything. Where rows of a
history of unknown length are picked (`hidden[length - 1]`), the bound is that length, by the name of its dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import numpy_helper

from stca.export.analysis import operators
from stca.export.analysis.cost import NominalSizes, any_sizes, without_weights
from stca.export.analysis.integers import fold_integers, known_integers
from stca.export.analysis.scope import attribute, walk

# What hands on the numbers of its first input.
_HANDS_ON: Final = (operators.VIEWS | operators.MOVES | {"Identity", "Cast", "Floor", "Round"}) - {"Concat"}
# What hands on a part of them.
_PARTS: Final = frozenset({"Gather", "GatherElements", "GatherND", "Slice", "Split"})
_UNBOUNDED: Final = 1 << 31
_COMPARES: Final = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})


@dataclass(frozen=True)
class Range:
    """Integers `low` to `high`, both included; `high` is at most the size of the dimension `size`, minus `short`.

    Attributes:
        low: least value.
        high: largest; infinity when only `size` bounds it.
        size: a symbolic dimension whose size bounds the value; None for none.
        short: how much below that size the largest value is: 1 for an index, 0 for a length.
        guarded: whether the graph looks at the value and may then not look a larger one up.
    """

    low: float = -math.inf
    high: float = math.inf
    size: str | None = None
    short: int = 0
    guarded: bool = dataclasses.field(default=False, compare=False)

    def within(self, other: Range) -> Range:
        """What satisfies both; of two sizes, the first stays."""
        kept = self if self.size is not None else other
        guarded = min((self.high, self.guarded), (other.high, other.guarded))[1]  # of equals, one that is not
        return Range(max(self.low, other.low), min(self.high, other.high), kept.size, kept.short, guarded)

    def shifted(self, least: int, most: int) -> Range:
        """What x must be in for x + c to be in this range, for every c from `least` to `most`."""
        short = self.short + most if self.size is not None else 0
        return dataclasses.replace(self, low=self.low - least, high=self.high - most, short=short)

    @property
    def bounded(self) -> bool:
        """Whether anything bounds it from above, or says that it may be negative."""
        return self.high < _UNBOUNDED or self.size is not None or -math.inf < self.low < 0


def input_ranges(model: onnx.ModelProto) -> dict[str, Range]:
    """What each input of the model may hold, where picking rows bounds it; other inputs are left out.

    Args:
        model: with its weights inline or not; its functions but the operator's are inlined. Not changed.
    """
    walked = _Walk(model)
    return {v.name: r for v in model.graph.input if (r := walked.demands.get(v.name)) is not None and r.bounded}


class _Walk:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._dims = NominalSizes(model, any_sizes(model.graph)).dims
        light = without_weights(model)
        fold_integers(light)
        nodes = list(walk(light.graph.node))
        self._writer = {name: node for node in nodes for name in node.output}
        self._always = {name for node in light.graph.node for name in node.output}
        self._known = known_integers(light.graph)
        self.demands: dict[str, Range] = {}
        self._of_parts: dict[str, set[Range]] = {}
        for node in reversed(nodes):
            self._settle(*node.output)
            if not node.domain:
                self._pick(node, guarded=not self._always.issuperset(node.output))
                for name in node.output:
                    if name in self.demands:
                        self._hand_back(node, self.demands[name])

        self._settle(*(v.name for v in light.graph.input))

    def _settle(self, *names: str) -> None:
        """Demand of a whole value what all of its parts must be; parts of several tables, say, bound no whole."""
        for name in names:
            if len(parts := self._of_parts.pop(name, set())) == 1:
                self._demand(name, parts.pop())

    def _demand(self, name: str, wanted: Range) -> None:
        if name and name not in self._known:
            if wanted.guarded and wanted.size is None:  # smaller ones may be sorted out, too
                wanted = dataclasses.replace(wanted, low=min(wanted.low, 0))
            self.demands[name] = self.demands[name].within(wanted) if name in self.demands else wanted

    def _pick(self, node: onnx.NodeProto, guarded: bool) -> None:
        """What a node that picks rows demands of its indices; `guarded` where it is in a branch."""
        if node.op_type in ("Gather", "GatherElements", "ScatterElements"):
            rows = self._rows(node.input[0], attribute(node, "axis", 0))
            self._demand(node.input[1], dataclasses.replace(rows, guarded=guarded))
        elif node.op_type in ("GatherND", "ScatterND"):
            for axis, column in enumerate(self._columns(node.input[1]), attribute(node, "batch_dims", 0)):
                self._demand(column, dataclasses.replace(self._rows(node.input[0], axis), guarded=guarded))

    def _rows(self, data: str, axis: int) -> Range:
        dims = self._dims(data) or ()
        size = dims[axis] if -len(dims) <= axis < len(dims) else None
        return Range(0, size - 1) if isinstance(size, int) else Range(0, size=size, short=1)

    def _reads(self, name: str) -> set[str]:
        """All values that one is computed from, itself among them."""
        found, left = set(), [name]
        while left:
            if (one := left.pop()) not in found:
                found.add(one)
                left += self._writer[one].input if one in self._writer else ()
        return found - set(self._known) - {""}

    def _columns(self, indices: str) -> Sequence[str]:
        """The values that a tensor of indices was put together from, one for each column; none when that is unseen."""
        node = self._writer.get(indices)
        while node is not None and node.op_type in ("Cast", "Identity"):
            node = self._writer.get(node.input[0])
        last = (self._dims(indices) or (None,))[-1]
        if node is not None and node.op_type == "Concat" and len(node.input) == last:
            return list(node.input)
        return [indices] if last == 1 else []

    def _hand_back(self, node: onnx.NodeProto, wanted: Range) -> None:
        """What a node must demand of its inputs for its result to be as wanted."""
        op, given = node.op_type, list(node.input)
        bounds = [self._bounds(name) for name in given]
        if op in _PARTS:
            self._of_parts.setdefault(given[0], set()).add(wanted)
        elif op in _HANDS_ON:
            self._demand(given[0], wanted)
        elif op == "Concat":
            for name in given:
                self._demand(name, wanted)
        elif op == "Where":
            self._demand_of_branches(node, wanted)
        elif op in ("Add", "Sub") and len([b for b in bounds if b]) == 1:
            at = 0 if bounds[0] else 1
            least, most = bounds[at] or (0, 0)
            columns = self._columns(given[1 - at]) if op == "Add" else []
            offsets = numpy_helper.to_array(self._known[given[at]]).flatten().tolist()
            if len(columns) == len(offsets) > 1:  # of fields that share a table, each with its own part
                for column, offset in zip(columns, offsets, strict=True):
                    of_field = wanted.shifted(offset, offset)
                    self._demand(column, dataclasses.replace(of_field, low=max(of_field.low, 0)))
            elif op == "Add":
                self._demand(given[1 - at], wanted.shifted(least, most))
            elif at == 1:
                self._demand(given[0], wanted.shifted(-most, -least))
            elif wanted.size is None:  # a constant minus x
                low, high = most - wanted.high, least - wanted.low
                self._demand(given[1], dataclasses.replace(wanted, low=low, high=high))
        elif op == "Mul" and bounds[1] and bounds[1][0] > 0 and wanted.size is None:
            low, high = math.ceil(wanted.low / bounds[1][0]), wanted.high // bounds[1][1]
            self._demand(given[0], dataclasses.replace(wanted, low=low, high=high))
        elif op == "Div" and bounds[1] and bounds[1][0] > 0 and wanted.size is None:
            least = bounds[1][0]
            low, high = wanted.low * least, wanted.high * least + least - 1
            self._demand(given[0], dataclasses.replace(wanted, low=low, high=high))
        elif op in ("Max", "Min", "Clip"):
            self._demand(given[0], self._clipped(op, bounds, wanted))
        # What `Mod` gives is bounded by its constant; what is computed otherwise says nothing of the inputs.

    def _demand_of_branches(self, node: onnx.NodeProto, wanted: Range) -> None:
        """A `Where` that looks at its own branch guards it: what is sorted out may be anything."""
        condition = self._writer.get(node.input[0])
        looked_at = list(condition.input) if condition else []
        for name in node.input[1:]:
            guard = condition.op_type if condition and name in looked_at else ""
            if guard in ("Equal", "Not"):
                for other in looked_at:
                    if bounds := self._bounds(other):
                        wanted = dataclasses.replace(
                            wanted, low=min(wanted.low, *bounds), high=max(wanted.high, *bounds)
                        )
            if guard not in _COMPARES:
                seen = self._reads(name) & self._reads(node.input[0])
                demanded = dataclasses.replace(wanted, guarded=wanted.guarded or bool(seen))
                # Whose other part goes another way: only runs show its end. A length's is its history's.
                if seen and wanted.size is None and self._compares(node.input[0]):
                    demanded = Range(wanted.low, guarded=True)
                self._demand(name, demanded)

    def _compares(self, condition: str) -> bool:
        """Whether a condition asks for more than equality."""
        return any(n in self._writer and self._writer[n].op_type in _COMPARES for n in self._reads(condition))

    def _clipped(self, op: str, bounds: Sequence[tuple[int, int] | None], wanted: Range) -> Range:
        """What is left to demand of a value that a constant bounds from below, from above or from both sides."""
        low = bounds[1] if op in ("Max", "Clip") and len(bounds) > 1 else None
        high = bounds[(op == "Clip" and 2) or 1] if op in ("Min", "Clip") and len(bounds) > 1 + (op == "Clip") else None
        if low and low[0] >= wanted.low:
            wanted = dataclasses.replace(wanted, low=-math.inf)
        if high and high[1] <= wanted.high and wanted.size is None:
            wanted = dataclasses.replace(wanted, high=math.inf)
        return wanted

    def _bounds(self, name: str) -> tuple[int, int] | None:
        """Least and largest of a constant; None for what is none."""
        if name not in self._known or not (values := numpy_helper.to_array(self._known[name])).size:
            return None
        return int(values.min()), int(values.max())
