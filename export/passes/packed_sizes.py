"""How many tokens a packed batch has, from its offsets: asked of the tokens, states would keep them all."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from stca.export.analysis.cost import Sizes, any_sizes
from stca.export.analysis.scope import attribute
from stca.export.passes.nodes import NewNodes, names_in
from stca.manifest import OFFSETS, TOKENS, TensorSpec, packable


def count_by_offsets(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Make each `Shape` of what has a row per token from the offsets' last entry, in place.

    The number is the whole batch's, so no user's state may hold it, and a target scorer that asks for it would get the
    tokens themselves.

    Args:
        model: valid.
        inputs: of the graph; nothing changes where they are not packed.
    """
    graph = model.graph
    offsets = next((s.name for s in inputs if s.scope == "user" and s.shape == (OFFSETS,)), None)
    if offsets is None or not packable(inputs) or not any(map(_is_shape, graph.node)):
        return
    sizes, new = Sizes(model, any_sizes(graph)), NewNodes(names_in(graph))
    count = ""
    for node in graph.node:
        dims = sizes.dims(node.input[0]) or () if _is_shape(node) else ()
        asked = dims[attribute(node, "start", 0) : attribute(node, "end", None)] if dims else ()
        if TOKENS not in asked or not all(n == TOKENS or isinstance(n, int) for n in asked):
            new.nodes.append(node)
            continue
        if not count:
            last = new.node("Gather", [offsets, new.integers([-1])], f"{offsets}_last")
            count = new.node("Cast", [last], "tokens", to=onnx.TensorProto.INT64)
        each = [new.integers([n]) if isinstance(n, int) else count for n in asked]
        new.node("Concat", each, node.output[0], exact=True, axis=0)
    del graph.node[:]
    graph.node.extend(new.nodes)
    graph.initializer.extend(new.weights)


def _is_shape(node: onnx.NodeProto) -> bool:
    return (node.op_type, node.domain) == ("Shape", "")
