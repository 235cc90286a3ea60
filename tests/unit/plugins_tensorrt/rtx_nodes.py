"""`python rtx_nodes.py LIBRARY`: build one node for each case with TensorRT-RTX, and tell what came of it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

from stca.engines.tensorrt_builder import _logger

TYPES = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
SIZES = {"N_t": (1, 300, 512), "N_h": (1, 10_000, 10_240), "B_plus_1": (2, 2, 9), "B": (1, 1, 8)}
SIZES |= {"N_s": (1, 9, 64), "N_s_plus_1": (2, 10, 65)}


def node(
    dtype: int, depth: int, value: int | None, offsets: int, lists: bool = False, bias: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """The operator alone, ragged; `value` is the type of a tensor of its own, None where the key is also the value.
    With `lists` the node takes the overload for segments, and their `bias`."""
    shapes = {"query": (dtype, ["N_t", 2, depth]), "key": (dtype, ["N_h", 1, depth])}
    if value is not None:
        shapes["value"] = (value, ["N_h", 1, depth])
    segments = "N_s" if lists else "B"
    shapes |= {
        "target_offsets": (offsets, ["B_plus_1"]),
        "history_offsets": (TensorProto.INT32, [f"{segments}_plus_1"]),
    }
    shapes["history_lengths"] = (TensorProto.INT32, [segments])
    if lists:
        shapes |= {"segment_offsets": (TensorProto.INT32, ["B_plus_1"]), "segment_bias": (bias, ["N_s"])}
    inputs = [helper.make_tensor_value_info(name, *of) for name, of in shapes.items()]
    names = ["query", "key", "value" if value is not None else "key", *(n for n in shapes if "_" in n)]
    made = helper.make_node(
        "TargetHistoryAttention", names, ["out"], name="node", domain="stca", scale=0.125, plugin_namespace="stca"
    )
    made.overload = "segments" if lists else ""
    out = helper.make_tensor_value_info("out", dtype, ["N_t", 2, depth])
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("stca", 1)]
    return helper.make_model(helper.make_graph([made], "graph", inputs, [out]), opset_imports=imports, ir_version=10)


def built(model: onnx.ModelProto, sm: int, library: str) -> dict[str, Any]:
    """Layers of the network and of the engine; None where it did not get so far."""
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, log).parse(model.SerializeToString()):
        return {"network": None, "engine": None}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.plugins_to_serialize = [library]
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    profile = builder.create_optimization_profile()
    for value in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        profile.set_shape(value.name, *([SIZES[d][k] if isinstance(d, str) else d for d in dims] for k in range(3)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    kinds = [layer["LayerType"] for layer in log.layers if layer["LayerType"] != "shape_call"]
    return {
        "network": [network.get_layer(i).type.name for i in range(network.num_layers)],
        "engine": None if plan is None else kinds,
        "holds_library": plan is not None and Path(library).read_bytes() in bytes(memoryview(plan)),
    }


def main(library: str) -> None:
    """All cases."""
    trt.get_plugin_registry().load_library(library)
    told = {}
    for (name, dtype), sm, tied in (
        (t, sm, tied) for t in TYPES.items() for sm in (80, 89, 120) for tied in (True, False)
    ):
        model = node(dtype, 32 if name == "float32" else 64, None if tied else dtype, TensorProto.INT32)
        told[f"{name} {sm} {'tied' if tied else 'apart'}"] = built(model, sm, library)
    told["float32 of 64"] = built(node(TensorProto.FLOAT, 64, None, TensorProto.INT32), 80, library)
    told["int64 offsets"] = built(node(TensorProto.FLOAT16, 64, None, TensorProto.INT64), 80, library)
    told["mixed"] = built(node(TensorProto.FLOAT16, 64, TensorProto.BFLOAT16, TensorProto.INT32), 80, library)
    for sm in (80, 89, 120):
        lists = node(TensorProto.BFLOAT16, 64, TensorProto.BFLOAT16, TensorProto.INT32, lists=True)
        told[f"lists {sm}"] = built(lists, sm, library)
    low = node(TensorProto.BFLOAT16, 64, None, TensorProto.INT32, lists=True, bias=TensorProto.BFLOAT16)
    told["low bias"] = built(low, 80, library)
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
