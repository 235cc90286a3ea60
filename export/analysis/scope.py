"""Where values come from: scopes flow from a graph's inputs along its dataflow, never from names.

A value's scope is the highest scope among the inputs it depends on, and what a control-flow body reads from outside
counts as read by the node that holds the body.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import onnx

from stca.errors import SplitError


class Scope(enum.IntEnum):
    """How long a value may be kept; a value that depends on several inputs has the highest of their scopes.

    CONSTANT values depend on weights alone. USER values may be cached across requests, REQUEST values are shared by one
    request's targets, TARGET values are per target. `str()` gives the name used in JSON.
    """

    CONSTANT = 0
    USER = 1
    REQUEST = 2
    TARGET = 3

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def of(cls, scope: Scope | str) -> Scope:
        """The scope of that name.

        Raises:
            SplitError: when an input cannot have that scope.
        """
        if str(scope) in ("user", "request", "target"):
            return cls[str(scope).upper()]
        raise SplitError(f"{str(scope)!r} is not a scope of an input; use user, request or target")


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies a control-flow node holds."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and, after each, those in its bodies, at any depth."""
    for node in nodes:
        yield node
        for body in subgraphs(node):
            yield from walk(body.node)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute; `default` where it has none of that name."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def reads(node: onnx.NodeProto) -> tuple[str, ...]:
    """Values a node depends on: its inputs, then what its bodies capture from outside; no name twice."""
    names = dict.fromkeys(name for name in node.input if name)
    for body in subgraphs(node):
        local = {value.name for value in (*body.input, *body.initializer)}
        local.update(tensor.values.name for tensor in body.sparse_initializer)
        for inner in body.node:
            names.update(dict.fromkeys(name for name in reads(inner) if name not in local))
            local.update(inner.output)
        names.update(dict.fromkeys(value.name for value in body.output if value.name not in local))
    return tuple(names)


# How the constant is called by whose rest ids are brought into the rows of a table's stand-in.
STAND_IN: Final = "stca_stand_in"


def is_stand_in(node: onnx.NodeProto) -> bool:
    """Whether a node brings ids into the rows of a stand-in, see `stca.export.tables`."""
    return node.op_type == "Mod" and node.input[1].startswith(STAND_IN)


def stand_ins(model: onnx.ModelProto) -> frozenset[str]:
    """Values of a graph that no state may hold: ids modulo a stand-in's rows, and what is made of them but rows."""
    found = set[str]()
    for node in model.graph.node:
        looks_up = node.op_type == "Gather" and node.input[0] not in found
        if is_stand_in(node) or (not looks_up and not found.isdisjoint(node.input)):
            found.update(node.output)
    return frozenset(found)


def opset_of(model: onnx.ModelProto, otherwise: int = 1) -> int:
    """The version of ONNX's own operators that a model imports; `otherwise` where it imports none."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), otherwise)


def label(node: onnx.NodeProto) -> str:
    """The node's name or, when it has none, its first output's."""
    return node.name or next((name for name in node.output if name), node.op_type)


@dataclass(frozen=True)
class Dataflow:
    """A graph's top level as a table: who writes a value, who reads it. Node numbers are positions in `graph.node`."""

    graph: onnx.GraphProto

    @cached_property
    def reads(self) -> tuple[tuple[str, ...], ...]:
        """By node: the values it depends on, captured ones included."""
        return tuple(reads(node) for node in self.graph.node)

    @cached_property
    def writer(self) -> dict[str, int]:
        """By value: the node that makes it; graph inputs and initializers have none."""
        return {name: i for i, node in enumerate(self.graph.node) for name in node.output if name}

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """By value: the nodes that depend on it, in order."""
        table: dict[str, list[int]] = {}
        for i, names in enumerate(self.reads):
            for name in names:
                table.setdefault(name, []).append(i)
        return table

    @cached_property
    def constants(self) -> frozenset[str]:
        """Names of the initializers, dense and sparse."""
        sparse = (tensor.values.name for tensor in self.graph.sparse_initializer)
        return frozenset((*(tensor.name for tensor in self.graph.initializer), *sparse))

    def needed(self, values: Iterable[str], given: Iterable[str] = ()) -> tuple[set[int], set[str]]:
        """What computing `values` takes when the values `given` are at hand: node numbers, and names of leaf values."""
        stop = set(given)
        nodes: set[int] = set()
        leaves: set[str] = set()
        open_values, seen = list(values), set()
        while open_values:
            name = open_values.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in stop or name not in self.writer:
                leaves.add(name)
            elif self.writer[name] not in nodes:
                nodes.add(self.writer[name])
                open_values.extend(self.reads[self.writer[name]])
        return nodes, leaves


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes, initializers and inputs that no output of the graph depends on, in place."""
    nodes, leaves = Dataflow(graph).needed(o.name for o in graph.output)
    for name, kept in (
        ("node", [n for i, n in enumerate(graph.node) if i in nodes]),
        ("initializer", [t for t in graph.initializer if t.name in leaves]),
        ("input", [v for v in graph.input if v.name in leaves]),
    ):
        graph.ClearField(name)
        getattr(graph, name).extend(kept)


def input_scopes(graph: onnx.GraphProto, inputs: Mapping[str, Scope | str]) -> dict[str, Scope]:
    """The scope of each graph input in `inputs`, checked; an input with a default value may be left out as constant.

    Raises:
        SplitError: when an input is not marked, or a mark names no input.
    """
    names = [value.name for value in graph.input]
    unknown = sorted(set(inputs) - set(names))
    if unknown:
        raise SplitError(f"the graph has no input {unknown[0]!r}; its inputs are {', '.join(names)}")
    constants = Dataflow(graph).constants
    for name in names:
        if name not in inputs and name not in constants:
            raise SplitError(
                f"input {name!r} has no scope; list it in one of --user-inputs, --request-inputs, --target-inputs"
            )
    return {name: Scope.of(inputs[name]) if name in inputs else Scope.CONSTANT for name in names}


def require_sides(scopes: Iterable[Scope]) -> None:
    """Raise SplitError where nothing is a user's, or nothing a target's."""
    there = set(scopes)
    if Scope.USER not in there:
        raise SplitError(
            "no input has scope user, so nothing can be cached; give it to the inputs known before a request "
            "(--user-inputs, or the scope of a TensorSpec)"
        )
    if Scope.TARGET not in there:
        raise SplitError(
            "no input has scope target, so there is nothing to score; give it to the inputs that differ between the "
            "items of one request (--target-inputs, or the scope of a TensorSpec)"
        )


def infer_scopes(model: onnx.ModelProto, inputs: Mapping[str, Scope | str]) -> dict[str, Scope]:
    """The scope of every value at the graph's top level.

    Args:
        model: nodes in topological order, as ONNX demands.
        inputs: the scope of each graph input, as `Scope` or its name.

    Returns:
        Scope by value name: inputs, initializers and node outputs.

    Raises:
        SplitError: when an input is not marked, a mark names no input, or a node reads a value that nothing makes.
    """
    flow = Dataflow(model.graph)
    scopes = dict.fromkeys(flow.constants, Scope.CONSTANT) | input_scopes(model.graph, inputs)
    for node, names in zip(model.graph.node, flow.reads, strict=True):
        for name in names:
            if name not in scopes:
                raise SplitError(
                    f"node {label(node)!r} reads {name!r}, which nothing before it makes; check the model first"
                )
        scope = max((scopes[name] for name in names), default=Scope.CONSTANT)
        scopes.update((name, scope) for name in node.output if name)
    return scopes


def explain(
    model: onnx.ModelProto, inputs: Mapping[str, Scope | str], value: str, scope: Scope | str = Scope.REQUEST
) -> tuple[str, ...]:
    """Why `value` is not of a lower scope: the shortest dataflow path to it from an input of `scope`.

    Returns:
        Value names from that input to `value`, both included; empty when no input of `scope` reaches it.

    Raises:
        SplitError: as `infer_scopes`.
    """
    marked = input_scopes(model.graph, inputs)
    wanted = Scope.of(scope)
    flow = Dataflow(model.graph)
    towards: dict[str, str] = {value: ""}
    queue = deque([value])
    while queue:
        name = queue.popleft()
        if marked.get(name) == wanted:
            path = [name]
            while towards[path[-1]]:
                path.append(towards[path[-1]])
            return tuple(path)
        for source in flow.reads[flow.writer[name]] if name in flow.writer else ():
            if source not in towards:
                towards[source] = name
                queue.append(source)
    return ()
