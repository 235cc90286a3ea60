"""A copy of an ONNX model that computes in float64, to serve as the reference of a model that has no torch module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping, MutableSequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from stca.arrays import Array
from stca.export.analysis.onnx_reference import reference_of
from stca.export.analysis.scope import subgraphs

Run: TypeAlias = Callable[[Mapping[str, Array]], list[Array]]

# Attributes that name an element type, by operator.
_TYPES = {("Cast", "to"), ("EyeLike", "dtype")}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def to_double(model: onnx.ModelProto, but: Container[str] = ()) -> onnx.ModelProto:
    """`model` with every floating-point type, weight, constant and cast widened to float64.

    For `onnx.reference`, which follows the values it is given; a strict runtime would also want every type constraint
    of every operator met.

    Args:
        model: not changed.
        but: weights to leave as they are.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for tensor in graph.initializer:
        if tensor.name not in but:
            _widen(tensor)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in _FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    for nodes in (graph.node, *(f.node for f in wide.functions)):
        _widen_nodes(nodes)
    return wide


def in_double(model: onnx.ModelProto, tables: Mapping[str, Array] | None = None) -> Run:
    """What computes the outputs of `model` in float64, given inputs of its own types.

    Args:
        model: not changed.
        tables: contents of weights that are hollow in the model and only looked up in: rows are widened, not tables.
    """
    tables = tables or {}
    evaluator = reference_of(_taking(to_double(model, tables), tables))

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        wide = {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in feeds.items()} | dict(tables)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # a mean over an empty history: both graphs have it
            return list(evaluator.run(None, wide))

    return run


def _taking(model: onnx.ModelProto, tables: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with these weights as inputs, and what is looked up in them widened; changed in place."""
    graph = model.graph
    weights, nodes = [t for t in graph.initializer if t.name not in tables], list[onnx.NodeProto]()
    for node in graph.node:
        nodes.append(node)
        if node.input and node.input[0] in tables:
            narrow, wide = f"{node.output[0]}_narrow", node.output[0]
            node.output[0] = narrow
            nodes.append(helper.make_node("Cast", [narrow], [wide], to=TensorProto.DOUBLE))
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(weights)
    graph.node.extend(nodes)
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in tables)
    return model


def distance(found: Array, wanted: Array) -> float:
    """Largest difference of two results, relative to their largest number; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        return float("inf")
    scale = max(float(np.abs(x[finite]).max(initial=1e-30)) for x in (a, b))
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale


def _widen_nodes(nodes: MutableSequence[onnx.NodeProto]) -> None:
    for i, node in reversed(list(enumerate(nodes))):
        for body in subgraphs(node):
            _widen_nodes(body.node)
            for tensor in body.initializer:
                _widen(tensor)
        if node.op_type == "ConstantOfShape" and not node.attribute:  # of float32, says ONNX
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen(attribute.t)
            elif (node.op_type, attribute.name) in _TYPES and attribute.i in _FLOATS:
                attribute.i = TensorProto.DOUBLE
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                # The number may be the function's own attribute (`@scale`), so it is widened behind the node.
                narrow, wide = f"{node.output[0]}_narrow", node.output[0]
                node.output[0] = narrow
                nodes.insert(i + 1, helper.make_node("Cast", [narrow], [wide], to=TensorProto.DOUBLE))


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        values = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
