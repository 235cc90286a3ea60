"""An ONNX model made ready for TensorRT: each operator node becomes the plugin, or the pair of plugins, that suits it.

The model that ONNX Runtime runs also parses as it is, if its nodes carry `plugin_namespace`: TensorRT takes the plugin
`TargetHistoryAttention` where it has one, and the function body where it has not. What `prepare` adds is speed: one
read of a token where key and value are one tensor, and a history cut into parts where one pass would leave most of the
GPU idle. The prepared model is for TensorRT with these plugins and runs nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import helper, shape_inference

from stca.errors import BuildError
from stca.plugins import onnx_function, tiling
from stca.plugins.aot import artifact_sm
from stca.plugins.devices import device_for
from stca.plugins.spec import (
    DOMAIN,
    OP_NAME,
    PLAIN,
    QUALIFIED_NAME,
    TENSORRT_JOIN,
    TENSORRT_PARTS,
    TENSORRT_SEGMENTS,
    TENSORRT_SEGMENTS_PARTS,
    TENSORRT_TIED,
)
from stca.plugins.tiling import Shape, Sizes

_DTYPES: dict[int, str] = {
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.FLOAT: "float32",
}


def mark(model: onnx.ModelProto) -> None:
    """Give every operator node the attribute by which TensorRT finds the plugin, in place; nothing else changes."""
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP_NAME) and not any(
            attribute.name == "plugin_namespace" for attribute in node.attribute
        ):
            node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))


def operators(model: onnx.ModelProto) -> list[tuple[Shape, float]]:
    """Shape and scale of the model's operator nodes, each once: what a plugin library for it must hold.

    A shape is tied where key and value are one tensor in the graph. Which nodes are is known from there.

    Raises:
        BuildError: when a head size is unknown or unsupported.
    """
    types = _tensor_types(model)
    found: dict[tuple[Shape, float], None] = {}
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP_NAME):
            try:
                found[_shape(node, types), _scale(node)] = None
            except ValueError as error:
                raise BuildError(str(error)) from error
    return list(found)


def prepare(
    model: onnx.ModelProto,
    sizes: Sizes | None = None,
    sm: int | None = None,
    *,
    shared_limit: int = tiling.PORTABLE_SHARED_LIMIT,
) -> onnx.ModelProto:
    """A copy of `model` with the operator's nodes replaced by plugins.

    Args:
        model: with the operator as nodes of the main graph; head counts and sizes are static. Weights may be external.
        sizes: what the engine's optimization profile is tuned for. The cost model then says into how many parts a
            history is cut; without it every history is one part.
        sm: compute capability of the GPU, 90 for 9.0; needed with `sizes`, as each GPU wants other parts.
        shared_limit: as in `tensorrt_plugin.Settings`.

    Raises:
        BuildError: when a head size is unknown or unsupported, or the SM is, or there are sizes without an SM.
    """
    if sizes is not None and sm is None:
        raise BuildError("prepare: sizes without sm; name the GPU's compute capability too, such as sm=90 for 9.0")
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    device = None if sm is None else device_for(artifact_sm(sm))
    types = _tensor_types(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP_NAME):
            nodes.append(node)
            continue
        try:
            shape = _shape(node, types)
            parts = 1
            if sizes is not None and device is not None:
                tiling.check_sizes(shape, sizes)
                parts = tiling.choose(shape, sizes, device, shared_limit).parts
        except ValueError as error:
            raise BuildError(str(error)) from error
        nodes += _plugins(node, shape, parts)
    del prepared.graph.node[:]
    prepared.graph.node.extend(nodes)
    return prepared


def _plugins(node: onnx.NodeProto, shape: Shape, parts: int) -> list[onnx.NodeProto]:
    """The nodes that replace `node`."""
    given: dict[str, Any] = {"scale": _scale(node), "domain": DOMAIN, "plugin_namespace": DOMAIN}
    if parts == 1:
        kind = TENSORRT_SEGMENTS if shape.segments else TENSORRT_TIED if shape.tied else OP_NAME
        if shape.segments:
            given["tied"] = int(shape.tied)
        return [helper.make_node(kind, node.input, node.output, name=node.name, **given)]
    name = node.name or node.output[0]
    partial = [f"{name}/partial_out", f"{name}/partial_stats"]
    kind = TENSORRT_SEGMENTS_PARTS if shape.segments else TENSORRT_PARTS
    given |= {"parts": parts, "tied": int(shape.tied)}
    join = {"dtype": shape.dtype, "domain": DOMAIN, "plugin_namespace": DOMAIN}
    return [
        helper.make_node(kind, node.input, partial, name=f"{name}/parts", **given),
        helper.make_node(TENSORRT_JOIN, partial, node.output, name=f"{name}/join", **join),
    ]


def _scale(node: onnx.NodeProto) -> float:
    return next(float(attribute.f) for attribute in node.attribute if attribute.name == "scale")


def _shape(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto.Tensor]) -> Shape:
    """What is compiled into the node's kernel."""
    sizes: dict[str, list[int]] = {}
    for argument, name in zip(("query", "key", "value"), node.input, strict=False):
        if name not in types or len(types[name].shape.dim) != 3:
            raise BuildError(f"{QUALIFIED_NAME} '{node.name}': the shape of its {argument} '{name}' is unknown")
        sizes[argument] = [d.dim_value for d in types[name].shape.dim[1:]]
        if not all(sizes[argument]):
            raise BuildError(
                f"{QUALIFIED_NAME} '{node.name}': {argument} '{name}' has dynamic heads or head size; "
                "export the model with both static"
            )
    dtype = types[node.input[0]].elem_type
    if dtype not in _DTYPES:
        given = onnx.TensorProto.DataType.Name(dtype)
        usable = ", ".join(_DTYPES.values())
        raise BuildError(f"{QUALIFIED_NAME} '{node.name}': dtype {given} is not supported; use {usable}")
    (heads, depth), (key_heads, _), (_, value_depth) = sizes["query"], sizes["key"], sizes["value"]
    tied, segments = node.input[1] == node.input[2], len(node.input) > len(PLAIN)
    return Shape(heads, key_heads, depth, value_depth, _DTYPES[dtype], tied, segments)


def _tensor_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Type and shape of every tensor of the main graph that inference can tell."""
    onnx_function.register_schema()
    graph = shape_inference.infer_shapes(model).graph
    types = {info.name: info.type.tensor_type for info in (*graph.input, *graph.value_info, *graph.output)}
    for weight in graph.initializer:
        types[weight.name] = helper.make_tensor_type_proto(weight.data_type, weight.dims).tensor_type
    return types
