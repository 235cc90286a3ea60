"""An `If` whose condition is known is the branch that it takes: exporters ask for ranks, which every graph fixes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stca.export.analysis.cost import without_weights
from stca.export.analysis.integers import integers_of
from stca.export.analysis.scope import attribute
from stca.export.passes.nodes import NewNodes, inlined, names_in


def take_branches(model: onnx.ModelProto) -> bool:
    """Put the nodes of the branch that is taken in place of such an `If` of the graph's top level, in place.

    A condition is known where it follows from constants and from ranks, `Size(Shape(x))`, that inference knows.

    Returns:
        Whether there was any.
    """
    found = False
    while any(n.op_type == "If" for n in model.graph.node) and _take(model):
        found = True
    return found


def _take(model: onnx.ModelProto) -> bool:
    """Take what branches can be told now; whether there were any."""
    graph = model.graph
    _name_ranks(model)
    known = {n: bool(x.item()) for n, x in integers_of(model).items() if x.dtype == np.bool_ and x.size == 1}
    new = NewNodes(names_in(graph))
    found = False
    for node in graph.node:
        if node.op_type != "If" or node.domain or node.input[0] not in known:
            new.nodes.append(node)
            continue
        body = attribute(node, "then_branch" if known[node.input[0]] else "else_branch", None)
        if body.initializer:  # `lift_weights` leaves none in a file's model
            new.nodes.append(node)
            continue
        found = True
        for made, output in zip(inlined(new, body, {}), node.output, strict=True):
            new.node("Identity", [made], output, exact=True)
    del graph.node[:]
    graph.node.extend(new.nodes)
    return found


def _name_ranks(model: onnx.ModelProto) -> None:
    """Make a constant of each rank that inference knows."""
    shapes = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Shape" and not n.attribute}
    sizes = [n for n in model.graph.node if n.op_type == "Size" and n.input[0] in shapes]
    if not sizes:
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    except Exception:  # onnx's own types
        return
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}
    for node in sizes:
        if (rank := ranks.get(shapes[node.input[0]])) is not None:
            node.op_type = "Constant"
            del node.input[:], node.attribute[:]
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.array(rank, np.int64))))
