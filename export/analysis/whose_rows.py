"""Whose rows a graph has: the size that counts users and targets alike, and what is made of sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from stca.export.analysis.operators import SIZES
from stca.export.analysis.scope import Dataflow, Scope, reads
from stca.probe import shared_rows
from stca.specs import TensorSpec


def row_size(inputs: Sequence[TensorSpec]) -> str | None:
    """The symbolic size that counts a graph's targets; None where there is none, or the graph has offsets for them.

    It is the batch's, where users and targets share that, and otherwise the first size of the target inputs.
    """
    if any(s.is_offsets for s in inputs):
        return None
    firsts = {n for s in inputs if s.scope == "target" for n in s.shape[:1] if isinstance(n, str)}
    names = shared_rows(inputs) or firsts - {n for s in inputs if s.scope != "target" for n in s.shape}
    return names.pop() if len(names) == 1 else None


def shares_rows(inputs: Sequence[TensorSpec]) -> bool:
    """Whether one size counts the rows of targets and of users."""
    return row_size(inputs) is not None and bool(shared_rows(inputs))


def repeats_users(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> bool:
    """Whether a node makes more rows of a user's value as a target's shape says."""
    marks = Marks(model.graph, {s.name: Scope.of(s.scope or "user") for s in inputs})
    targets = {s.name for s in inputs if s.scope == "target"}
    flow = Dataflow(model.graph)
    for i, node in enumerate(model.graph.node):
        sizes = [n for n in flow.reads[i] if n in marks.sizes]
        if marks.of.get(node.output[0]) in (Scope.USER, Scope.REQUEST) and flow.needed(sizes)[1] & targets:
            return True
    return False


class Marks:
    """The scope of every value, sizes apart.

    Attributes:
        of: scope by value, as it follows from values alone.
        sizes: values that follow from shapes and constants.
    """

    def __init__(self, graph: onnx.GraphProto, inputs: Mapping[str, Scope]) -> None:
        self.of: dict[str, Scope] = dict.fromkeys(Dataflow(graph).constants, Scope.CONSTANT) | dict(inputs)
        self.sizes: set[str] = set()
        for node in graph.node:
            names = reads(node)
            if node.op_type in SIZES and not node.domain:
                constant = all(n not in self.sizes and self.of[n] == Scope.CONSTANT for n in names)
                is_size, scope = not constant, Scope.CONSTANT
            else:
                scope = max((self.of[n] for n in names), default=Scope.CONSTANT)
                is_size = scope == Scope.CONSTANT and not self.sizes.isdisjoint(names)
            self.of.update((n, scope) for n in node.output if n)
            if is_size:
                self.sizes.update(n for n in node.output if n)
