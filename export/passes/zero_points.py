"""A zero point for each weight of int8, as ONNX Runtime wants it where it must not cut sums off."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from stca.export.passes.nodes import NewNodes, names_in


def name_zero_points(model: onnx.ModelProto) -> None:
    """Give dequantized weights of int8 zero points of their own, in place.

    Processors without VNNI add two products in 16 bits, too few for int8. The option by which ONNX Runtime computes
    them right there makes uint8 of such weights. It fails where two share a zero point, or where one with a scale for
    each channel has none.
    """
    graph = model.graph
    constants = [n for n in graph.node if (n.op_type, n.domain) == ("Constant", "")]
    known = {t.name: t for t in graph.initializer}
    known |= {n.output[0]: a.t for n in constants for a in n.attribute if a.name == "value"}
    readers = Counter(name for n in graph.node for name in n.input)
    new = NewNodes(names_in(graph))
    for node in graph.node:
        if (node.op_type, node.domain) != ("DequantizeLinear", ""):
            continue
        numbers, scales, zero = (known.get(name) for name in (*node.input, "")[:3])
        if numbers is None or scales is None or numbers.data_type != TensorProto.INT8:
            continue
        if zero is not None and readers[node.input[2]] > 1:
            values = numpy_helper.to_array(zero)
        elif not any(node.input[2:]) and len(scales.dims) == 1:
            values = np.zeros(scales.dims[0], np.int8)
        else:
            continue
        own = numpy_helper.from_array(values)
        node.input[2:] = [new.node("Constant", [], f"{node.input[0]}_zero", value=own)]
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend([*new.nodes, *body])
