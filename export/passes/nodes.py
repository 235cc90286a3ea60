"""Nodes that a pass adds to a graph, under names that nothing there has, or that it has read other values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stca.export.analysis.scope import subgraphs


class NewNodes:
    """What a pass adds, in the order in which it is made.

    Args:
        taken: names that nothing new may have (`names_in`); those of the new nodes are added to it.

    Attributes:
        nodes: the new nodes; a pass may put the graph's own among them.
        weights: the new initializers.
    """

    def __init__(self, taken: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._constants: dict[tuple[int, ...], str] = {}
        self._taken = taken

    def name(self, stem: str) -> str:
        """`stem`, or `stem` with a number: a name that nothing has, kept for the caller."""
        name = stem if stem not in self._taken else next(n for i in count(2) if (n := f"{stem}_{i}") not in self._taken)
        self._taken.add(name)
        return name

    def node(
        self, kind: str, inputs: Sequence[str], name: str, exact: bool = False, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output.

        Args:
            kind: its operator.
            inputs: the values it reads.
            name: of its output, and of the node.
            exact: whether the output must have that very name, a value's that the pass replaces.
            domain: of the operator.
            attributes: of the node.

        Returns:
            The output's name.
        """
        name = name if exact else self.name(name)
        self._taken.add(name)
        # A value of that very name was another node's before, and that node may be called like it.
        called = self.name(f"{name}_node") if exact else name
        self.nodes.append(helper.make_node(kind, inputs, [name], called, domain=domain, **attributes))
        return name

    def last_makes(self, name: str) -> None:
        """Let the last node make `name`, a value that the pass replaces."""
        self.nodes[-1].output[0] = name

    def integers(self, values: Sequence[int]) -> str:
        """The name of an int64 initializer of shape [len(values)]; the same one for the same values."""
        key = tuple(values)
        if key not in self._constants:
            self._constants[key] = self.weight("_".join(["integers", *map(str, values)]), np.array(values, np.int64))
        return self._constants[key]

    def weight(self, stem: str, values: Any) -> str:
        """The name of a new initializer with these values."""
        name = self.name(stem)
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Names of a graph's values, weights and nodes, and of those in its bodies: none may be hidden there."""
    named = (graph.input, graph.initializer, graph.output, graph.node)
    taken = {x.name for values in named for x in values} | {n for x in graph.node for n in x.output}
    taken |= {t.values.name for t in graph.sparse_initializer}
    return taken.union(*(names_in(body) for node in graph.node for body in subgraphs(node)))


def renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy of a node that reads other values: `names` has the new name by the old one."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    rename(copy, {a: b for a, b in names.items() if a != b})
    return copy


def rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Read other values, in place; in bodies too, where a name of the body's own does not hide it."""
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for body in subgraphs(node):
        own = {v.name for v in (*body.input, *body.initializer)} | {o for n in body.node for o in n.output}
        inner = {a: b for a, b in names.items() if a not in own}
        for n in body.node:
            rename(n, inner)
        for value in body.output:
            value.name = inner.get(value.name, value.name)


def inlined(new: NewNodes, body: onnx.GraphProto, names: dict[str, str]) -> list[str]:
    """Add a body's nodes to the graph's own, under new names.

    Args:
        new: where to; the body stays as it is.
        body: without weights of its own.
        names: those of the graph, by what the body calls its inputs; gets those of all that the body makes.

    Returns:
        The names of the body's outputs.
    """
    for node in body.node:
        copy = renamed(node, names)
        for i, output in enumerate(node.output):
            if output:  # one that is left out keeps its place
                copy.output[i] = names[output] = new.name(output)
        copy.name = new.name(node.name or node.op_type)
        new.nodes.append(copy)
    return [names.get(value.name, value.name) for value in body.output]
