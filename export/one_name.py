"""Graphs that others made, as passes know them: every value has a name of its own, no functions, all weights on top."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

import onnx
import onnx.inliner
from onnx import helper

from stca.errors import SplitError
from stca.export.analysis.scope import label, reads, subgraphs
from stca.export.passes.nodes import NewNodes, names_in, rename
from stca.plugins.spec import DOMAIN

# A Constant of more bytes is a weight: each graph of a bundle would have it in itself.
_LARGE: Final = 1 << 10


def inline(model: onnx.ModelProto) -> None:
    """Put functions but the operator's in the place of their calls, in place, each in the model's own operators.

    Raises:
        onnx's own errors, of many types: when a function calls itself, or is of operators that cannot be converted.
    """
    own, foreign = ([f for f in model.functions if (f.domain == DOMAIN) is of] for of in (True, False))
    if not foreign:
        return
    imported = {_domain(o): o.version for o in model.opset_import}
    imported |= {f.domain: 1 for f in foreign if f.domain not in imported}
    versions = [(_domain(o), o.version) for f in foreign for o in f.opset_import]
    convert = any(imported.setdefault(domain, version) != version for domain, version in versions)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.functions[:], whole.opset_import[:]
    whole.functions.extend(foreign)
    whole.opset_import.extend(helper.make_opsetid(*o) for o in imported.items())
    if convert:  # which asks for the type of everything that is read
        weights = whole.graph.initializer
        whole.graph.value_info.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)
        whole = onnx.shape_inference.infer_shapes(whole)
    whole = onnx.inliner.inline_local_functions(whole, convert)
    del whole.graph.value_info[:]
    whole.functions.extend(own)
    model.CopyFrom(whole)


def _domain(imported: onnx.OperatorSetIdProto) -> str:
    return "" if imported.domain == "ai.onnx" else imported.domain


def lift_weights(model: onnx.ModelProto) -> None:
    """Make initializers of the graph, in place, of those of its bodies, and of Constants as large as weights."""
    graph = model.graph
    new = NewNodes(names_in(graph))
    outputs = {o.name for o in graph.output}
    large = {i: n for i, n in enumerate(graph.node) if _is_large(n) and n.output[0] not in outputs}
    for node in large.values():
        graph.initializer.append(_weight(node.attribute[0].t, node.output[0]))
    for i in reversed(large):
        del graph.node[i]
    same: dict[tuple[str, bytes], str] = {}
    for body in _bodies(graph):
        given = {v.name for v in body.input}
        tensors = [t for t in body.initializer if t.name not in given]
        tensors += [_weight(n.attribute[0].t, n.output[0]) for n in body.node if _is_large(n)]
        names = {}
        for tensor in tensors:
            key = (tensor.name, tensor.SerializeToString(deterministic=True))
            if key not in same:
                same[key] = new.name(tensor.name)
                graph.initializer.append(_weight(tensor, same[key]))
            names[tensor.name] = same[key]
        kept = [t for t in body.initializer if t.name in given]
        nodes = [n for n in body.node if not (n.output and n.output[0] in names)]
        del body.initializer[:], body.node[:]
        body.initializer.extend(kept)
        for output in body.output:  # a body makes what it gives
            if output.name in names:
                nodes.append(helper.make_node("Identity", [output.name], [new.name(output.name)]))
                output.name = nodes[-1].output[0]
        body.node.extend(nodes)
        for node in body.node:
            rename(node, names)


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for body in subgraphs(node):
            yield body
            yield from _bodies(body)


def _is_large(node: onnx.NodeProto) -> bool:
    value = node.attribute[0] if node.op_type == "Constant" and len(node.attribute) == 1 else None
    return value is not None and value.name == "value" and value.t.ByteSize() > _LARGE


def _weight(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    made = onnx.TensorProto()
    made.CopyFrom(tensor)
    made.name = name
    return made


def name_once(model: onnx.ModelProto) -> None:
    """Give every value and node a name of its own, in place; a graph of which that is so stays as it is.

    Nodes run in order: a name that several nodes make means what was made last. A name that a node and an input or a
    weight have means the one of which the reader takes the type. Names in a body hide those outside.

    Raises:
        SplitError: naming the node that may read either, or what has two values by one name.
    """
    graph = model.graph
    new = NewNodes(names_in(graph))
    _drop_equal_weights(graph)
    for part in (graph, *_bodies(graph)):
        called = Counter(n.name for n in part.node if n.name)
        for node in part.node:
            if called[node.name] > 1:
                called[node.name] -= 1
                node.name = new.name(node.name)
    made = Counter(o for n in graph.node for o in n.output if o)
    made.update({v.name for v in (*graph.input, *graph.initializer)})
    hidden = made.keys() & {o for body in _bodies(graph) for o in _own(body)}
    if hidden or max(made.values(), default=0) > 1:
        _Renaming(model, new, set(made)).run()


def _drop_equal_weights(graph: onnx.GraphProto) -> None:
    known: dict[str, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        if known.setdefault(tensor.name, tensor) != tensor:
            raise SplitError(f"two weights that differ are called {tensor.name!r}; give each a name of its own")
    if len(known) < len(graph.initializer):
        kept = [_weight(t, t.name) for t in known.values()]
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _own(body: onnx.GraphProto) -> list[str]:
    return [v.name for v in (*body.input, *body.initializer)] + [o for n in body.node for o in n.output if o]


class _Renaming:
    """New names for all but the first value of a name, in the nodes' order.

    Args:
        outer: names of the graph's own values, which no body may hide.
    """

    def __init__(self, model: onnx.ModelProto, new: NewNodes, outer: set[str]) -> None:
        self.model, self.new, self.outer = model, new, outer
        graph = model.graph
        self.given = {v.name for v in (*graph.input, *graph.initializer)}
        self.now = {name: name for name in self.given}  # by the name that the file has
        self.types = {v.name: v.type for v in graph.input}
        self.types |= {t.name: helper.make_tensor_type_proto(t.data_type, t.dims) for t in graph.initializer}

    def run(self) -> None:
        graph = self.model.graph
        for node in graph.node:
            self.read(node)
            for body in subgraphs(node):
                self.inside(body, self.now)
            for i, name in enumerate(node.output):
                if name:
                    node.output[i] = self.now[name] = self.new.name(name) if name in self.now else name
            self.types.update(self.typed(node) or {})
        swapped = {o.name: self.now[o.name] for o in graph.output if self.now.get(o.name, o.name) != o.name}
        if clash := sorted(swapped.keys() & self.given):
            raise SplitError(f"an input or weight and an output are both called {clash[0]!r}; name one otherwise")
        swapped |= {b: a for a, b in swapped.items()}
        for node in graph.node:
            rename(node, swapped)
            node.output[:] = [swapped.get(o, o) for o in node.output]
        del graph.value_info[:]

    def read(self, node: onnx.NodeProto) -> None:
        """Let the node, and not what is in its bodies, read what is meant."""
        either = sorted({n for n in reads(node) if n in self.given and self.now[n] != n})
        wanted = dict(self.now)
        for name in either:
            fit = [x for x in (name, self.now[name]) if name in node.input and self.typed(node, {**wanted, name: x})]
            if len(fit) != 1:
                raise SplitError(
                    f"node {label(node)!r} ({node.op_type}) reads {name!r}, and both an input or weight and a node's "
                    "output are called so; give the input another name where the model is exported"
                )
            wanted[name] = fit[0]
        node.input[:] = [wanted.get(n, n) for n in node.input]

    def typed(self, node: onnx.NodeProto, names: Mapping[str, str] | None = None) -> dict[str, onnx.TypeProto] | None:
        """Types of what a node makes of such values; None where its operator does not take them."""
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        alone.input[:] = [(names or {}).get(n, n) for n in node.input]
        inputs = {n: self.types.get(n) for n in alone.input if n}
        if None in inputs.values() or any(True for _ in subgraphs(node)):
            return {"": onnx.TypeProto()}  # nothing is known
        values = [onnx.ValueInfoProto(name=n, type=t) for n, t in inputs.items()]
        made = helper.make_graph([alone], "alone", values, [onnx.ValueInfoProto(name=o) for o in node.output if o])
        whole = helper.make_model(made, opset_imports=self.model.opset_import, functions=self.model.functions)
        try:
            found = onnx.shape_inference.infer_shapes(whole, check_type=True, strict_mode=True)
        except onnx.shape_inference.InferenceError:
            return None
        return {o.name: o.type for o in found.graph.output if o.type.WhichOneof("value")} | {"": onnx.TypeProto()}

    def inside(self, body: onnx.GraphProto, outside: Mapping[str, str]) -> None:
        """Give a body's own values names that are not known outside, and let it read what is meant there."""
        names = dict(outside)
        for value in (*body.input, *body.initializer):
            names[value.name] = self.free(value.name)
            value.name = names[value.name]
        for node in body.node:
            node.input[:] = [names.get(n, n) for n in node.input]
            for inner in subgraphs(node):
                self.inside(inner, names)
            for i, name in enumerate(node.output):
                if name:
                    node.output[i] = names[name] = self.free(name)
        for value in body.output:
            value.name = names.get(value.name, value.name)
        del body.value_info[:]

    def free(self, name: str) -> str:
        """A name for a value of a body: its own, but where a value outside has that."""
        return self.new.name(name) if name in self.outer else name
