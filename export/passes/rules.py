"""Rewrites of a request graph, one rule at a time: a pattern, a check with its reason, and a rewrite.

A rule finds its pattern at one node, says why it may not be rewritten there, or gives the nodes that take its place.
Every verdict is kept, so that `stca inspect --why` can tell where a rule fired and why it did not elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Protocol

import numpy as np
import onnx
from onnx import numpy_helper

from stca.arrays import Array
from stca.errors import SplitError
from stca.export.analysis.cost import Measured, NominalSizes
from stca.export.analysis.layout import Tried, tried
from stca.export.analysis.rows import constants_of
from stca.export.analysis.scope import Dataflow, Scope, infer_scopes, label, reads
from stca.export.passes.nodes import names_in, renamed
from stca.plugins import onnx_function
from stca.plugins.spec import DOMAIN

# Times that one rule goes over a graph: one that undoes its own work would go on for ever.
_MOST: Final = 100


@dataclass(frozen=True)
class Verdict:
    """What a rule did where it found its pattern: `why` is the reason it did not fire, None where it fired."""

    rule: str
    node: str
    why: str | None = None


@dataclass(frozen=True)
class Rewrite:
    """Nodes in place of one node, in topological order; they make its outputs, under the same names.

    Attributes:
        nodes: the new nodes.
        weights: initializers that they read and the graph does not have.
    """

    nodes: Sequence[onnx.NodeProto]
    weights: Sequence[onnx.TensorProto] = ()


@dataclass(frozen=True)
class View:
    """A graph as rules look at it; made anew after each rewrite.

    Attributes:
        model: weights inline, functions inlined but the operator's. Rules do not change it.
        inputs: scope of each input.
        workload: nominal sizes, by symbolic size.
        measured: shapes of values as runs showed them.
    """

    model: onnx.ModelProto
    inputs: Mapping[str, Scope | str]
    workload: Mapping[str, int]
    measured: Measured = field(default_factory=dict)

    @cached_property
    def flow(self) -> Dataflow:
        """Who writes and who reads each value."""
        return Dataflow(self.model.graph)

    @cached_property
    def scopes(self) -> dict[str, Scope]:
        """The scope of every value."""
        return infer_scopes(self.model, self.inputs)

    @cached_property
    def sizes(self) -> NominalSizes:
        """Types, shapes and nominal sizes of every value."""
        return NominalSizes(self.model, self.workload, self.measured)

    @cached_property
    def tried(self) -> tuple[Tried, Tried]:
        """Every value in two small runs; `Layout` is raised where the graph does not run."""
        return tried(self.model, self.inputs)

    @cached_property
    def _tensors(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in constants_of(self.model.graph)}

    def constant(self, name: str) -> Array | None:
        """The value of an initializer or Constant node; None for any other value."""
        tensor = self._tensors.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def writer(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for inputs and initializers."""
        i = self.flow.writer.get(name)
        return None if i is None else self.model.graph.node[i]

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, in order; a graph output that is read by no node has none."""
        return [self.model.graph.node[i] for i in self.flow.readers.get(name, ())]

    def is_output(self, name: str) -> bool:
        """Whether the graph returns this value."""
        return any(name == out.name for out in self.model.graph.output)

    def others_read(self, *names: str) -> str | None:
        """Which of these values more than one node reads, or the graph returns, as why they must stay."""
        found = (n for n in names if len(self.readers(n)) > 1 or self.is_output(n))
        return next((f"{name!r} has other readers" for name in found), None)

    @cached_property
    def taken(self) -> set[str]:
        """Names that no new value may have; `NewNodes` adds those of its own."""
        return names_in(self.model.graph)


class Rule(Protocol):
    """One kind of rewrite."""

    name: str

    def pattern(self, view: View, node: onnx.NodeProto) -> Any | None:
        """What the rule found at `node`, for the other two methods; None where the pattern is not there."""

    def check(self, view: View, match: Any) -> str | None:
        """Why the match is not rewritten, in words for the model's author; None where it is."""

    def rewrite(self, view: View, match: Any) -> Rewrite:
        """The nodes that take the place of the matched node; what only they made unneeded is removed."""


def apply(rule: Rule, view: View, but: Collection[str] = ()) -> tuple[View, list[Verdict]]:
    """Rewrite wherever `rule` fires, until it fires nowhere.

    Each rewrite makes the very values of the node it replaces, so all matches in one graph are rewritten at once.

    Args:
        rule: to apply.
        view: of the graph to rewrite; its model is not changed.
        but: outputs of nodes to leave alone.

    Returns:
        A view of the rewritten graph, the same one when nothing fired, and a verdict for each match.

    Raises:
        SplitError: when the rule never comes to an end.
    """
    fired: list[Verdict] = []
    for _ in range(_MOST):
        refused: list[Verdict] = []
        rewrites: dict[int, Rewrite] = {}
        for i, node in enumerate(view.model.graph.node):
            match = None if node.output[0] in but else rule.pattern(view, node)
            if match is None:
                continue
            why = rule.check(view, match)
            if why is None:
                rewrites[i] = rule.rewrite(view, match)
            (fired if why is None else refused).append(Verdict(rule.name, label(node), why))
        if not rewrites:
            return view, fired + refused
        view = rewritten(view, rewrites)
    raise SplitError(f"rule {rule.name!r} does not come to an end at node {fired[-1].node!r}")


def rewritten(view: View, rewrites: Mapping[int, Rewrite]) -> View:
    """A view of the graph with each rewrite in place of the node of its number, without what nothing needs then.

    What several rewrites make alike, a slice of a weight that two layers share, is made once.
    """
    model = onnx.ModelProto()
    model.CopyFrom(view.model)
    graph = model.graph
    made = _Once({n for node in graph.node for n in node.output})
    nodes = [new for i, node in enumerate(graph.node) for new in (made.of(rewrites[i]) if i in rewrites else [node])]
    if any(node.domain == DOMAIN for node in nodes):
        onnx_function.attach(model)
    live, _ = Dataflow(onnx.GraphProto(node=nodes)).needed(out.name for out in graph.output)
    kept = [node for i, node in enumerate(nodes) if i in live]
    used = {name for node in kept for name in reads(node)} | {out.name for out in graph.output}
    weights = [tensor for tensor in (*graph.initializer, *made.weights) if tensor.name in used]
    shapes = [value for value in graph.value_info if value.name in used]
    for field_, values in ((graph.node, kept), (graph.initializer, weights), (graph.value_info, shapes)):
        del field_[:]
        field_.extend(values)
    return View(model, view.inputs, view.workload, view.measured)


class _Once:
    """Nodes and weights of rewrites, those alike one time.

    Args:
        values: of the graph, which each keep a node of their own.

    Attributes:
        weights: that are left.
    """

    def __init__(self, values: Collection[str]) -> None:
        self.weights: list[onnx.TensorProto] = []
        self._values = values
        self._known: dict[tuple[bytes, ...], str] = {}
        self._names: dict[str, str] = {}

    def of(self, rewrite: Rewrite) -> list[onnx.NodeProto]:
        """The nodes that are new, reading what there is already."""
        for tensor in rewrite.weights:
            if self._is_new(tensor.name, b"weight", numpy_helper.to_array(tensor).tobytes(), *_type(tensor)):
                self.weights.append(tensor)
        made = []
        for node in rewrite.nodes:
            copy = renamed(node, self._names)
            given = sorted(a.SerializeToString(deterministic=True) for a in copy.attribute)
            what = (copy.domain, copy.op_type, str(len(copy.input)), *copy.input)
            whole = len(copy.output) > 1 or copy.output[0] in self._values
            if whole or self._is_new(copy.output[0], *(x.encode() for x in what), *given):
                made.append(copy)
        return made

    def _is_new(self, name: str, *what: bytes) -> bool:
        known = self._known.setdefault(what, name)
        if known != name:
            self._names[name] = known
        return known == name


def _type(tensor: onnx.TensorProto) -> tuple[bytes, ...]:
    return str(tensor.data_type).encode(), str(list(tensor.dims)).encode()
