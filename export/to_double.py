"""A copy of an ONNX model that computes in float64, to serve as the reference of a model that has no torch module."""

from __future__ import annotations

from collections.abc import MutableSequence

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from stca.export.scope import subgraphs

# Attributes that name an element type, by operator.
_TYPES = {("Cast", "to"), ("EyeLike", "dtype")}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with every floating-point type, weight, constant and cast widened to float64.

    For `onnx.reference`, which follows the values it is given; a strict runtime would also want every type constraint
    of every operator met.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in _FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    for nodes in (graph.node, *(f.node for f in wide.functions)):
        _widen_nodes(nodes)
    return wide


def _widen_nodes(nodes: MutableSequence[onnx.NodeProto]) -> None:
    for i, node in reversed(list(enumerate(nodes))):
        for body in subgraphs(node):
            _widen_nodes(body.node)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen(attribute.t)
            elif (node.op_type, attribute.name) in _TYPES and attribute.i in _FLOATS:
                attribute.i = TensorProto.DOUBLE
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                # The number may be the function's own attribute (`@scale`), so it is widened behind the node.
                narrow, wide = f"{node.output[0]}_narrow", node.output[0]
                node.output[0] = narrow
                nodes.insert(i + 1, onnx.helper.make_node("Cast", [narrow], [wide], to=TensorProto.DOUBLE))


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        values = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
