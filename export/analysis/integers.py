"""What follows from integer constants alone: axes, shapes, indices."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from stca.arrays import Array
from stca.export.analysis.cost import without_weights
from stca.export.analysis.scope import reads, subgraphs

INTEGERS: Final = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)


def fold_integers(model: onnx.ModelProto) -> None:
    """Compute, in place, what follows from integer constants alone: axes, shapes, indices.

    TensorRT's parser wants axes as constants and does not fold a Reshape of one. Weights are floats and stay.
    """
    graph = model.graph
    known = known_integers(graph)
    folded: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.domain or any(subgraphs(node)) or not all(name in known for name in node.input):
            continue
        if node.op_type == "Constant" or node.input:
            single = helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=n) for n in node.output])
            single.initializer.extend(known[name] for name in dict.fromkeys(node.input))
            values = ReferenceEvaluator(helper.make_model(single, opset_imports=model.opset_import)).run(None, {})
            tensors = [numpy_helper.from_array(np.asarray(v), n) for v, n in zip(values, node.output, strict=True)]
            if all(t.data_type in INTEGERS for t in tensors):
                known.update((t.name, t) for t in tensors)
                folded.append(node)
    names = {name for node in folded for name in node.output}
    kept = [node for node in graph.node if not names.intersection(node.output)]
    used = {name for node in kept for name in reads(node)} | {o.name for o in graph.output}
    graph.initializer.extend(known[name] for name in sorted(names & used))
    del graph.node[:]
    graph.node.extend(kept)


def integers_of(model: onnx.ModelProto) -> dict[str, Array]:
    """Integers that follow from constants alone, by value; the model is not changed."""
    light = without_weights(model)
    fold_integers(light)
    return {name: numpy_helper.to_array(tensor) for name, tensor in known_integers(light.graph).items()}


def known_integers(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Integer initializers by name; those whose contents are left out of the model are not known."""
    return {
        t.name: t
        for t in graph.initializer
        if t.data_type in INTEGERS
        and t.data_location != onnx.TensorProto.EXTERNAL
        and (t.raw_data or t.int32_data or t.int64_data or 0 in t.dims)
    }
