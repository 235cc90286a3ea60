"""The operator's implementations, each as a function from inputs and scale to the output tensor on the CPU."""

from __future__ import annotations

import functools
import zlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from support.attention_cases import DTYPES, Case, Inputs, inputs, poison_parts, signed_scale
from torch import Tensor

from stca.export.analysis.onnx_reference import reference_of
from stca.plugins import launch, onnx_function, torch_op  # noqa: F401  (torch_op registers the op)
from stca.plugins.interpret import Interpreter
from stca.plugins.spec import ARGUMENTS, DOMAIN, OP_NAME, PLAIN
from stca.plugins.tiling import Plan, Tile, power_of_two

_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
}


def torch_cpu(case: Case) -> Tensor:
    """`torch.ops.stca.target_history_attention`."""
    x = inputs(case)
    out: Tensor = torch.ops.stca.target_history_attention(*x.tensors(), signed_scale(case), *x.segments())
    return out


@functools.lru_cache(maxsize=64)
def onnx_model(dtype: str, scale: float, segments: bool) -> onnx.ModelProto:
    """One node of the operator with its function body, every dimension symbolic, with or without lists of segments.

    The output is widened to float32, which changes nothing in it: ONNX Runtime cannot hand bfloat16 to numpy.
    """
    types = {"values": _ONNX_TYPES[dtype], "structure": TensorProto.INT32, "logits": TensorProto.FLOAT}
    arguments = ARGUMENTS if segments else PLAIN
    graph = helper.make_graph(
        [
            helper.make_node(OP_NAME, [a.name for a in arguments], ["out"], domain=DOMAIN, scale=scale),
            helper.make_node("Cast", ["out"], ["out32"], to=TensorProto.FLOAT),
        ],
        "operator",
        [
            helper.make_tensor_value_info(a.name, types[a.kind], [s.replace(" + ", "_plus_") for s in a.shape])
            for a in arguments
        ],
        [helper.make_tensor_value_info("out32", TensorProto.FLOAT, ("N_t", "H", "D_v"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", onnx_function.OPSET)], ir_version=10)
    onnx_function.attach(model)
    return model


@functools.lru_cache(maxsize=64)
def _session(dtype: str, scale: float, segments: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    serialized = onnx_model(dtype, scale, segments).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=64)
def _evaluator(dtype: str, scale: float, segments: bool) -> ReferenceEvaluator:
    return reference_of(onnx_model(dtype, scale, segments))


def _arrays(x: Inputs) -> dict[str, NDArray[np.generic]]:
    return {
        a.name: y.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if y.dtype == torch.bfloat16 else y.numpy()
        for a, y in zip(ARGUMENTS, (*x.tensors(), *x.segments()), strict=False)
    }


def onnx_runtime(case: Case) -> Tensor:
    """The function body in ONNX Runtime on the CPU."""
    session = _session(case.dtype, signed_scale(case), case.layout.lists is not None)
    feeds = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x, _ONNX_TYPES[case.dtype])
        if x.dtype == ml_dtypes.bfloat16
        else onnxruntime.OrtValue.ortvalue_from_numpy(x)
        for name, x in _arrays(inputs(case)).items()
    }
    (out,) = session.run_with_ort_values(None, feeds)
    return torch.from_numpy(out.numpy()).to(DTYPES[case.dtype])


def onnx_reference(case: Case) -> Tensor:
    """The function body in onnx's own evaluator."""
    evaluator = _evaluator(case.dtype, signed_scale(case), case.layout.lists is not None)
    (out,) = evaluator.run(None, _arrays(inputs(case)))
    return torch.from_numpy(out).to(DTYPES[case.dtype])


def small_plan(case: Case) -> Plan:
    """Small blocks, so that small cases have many: their sizes and the number of parts differ from case to case."""
    pick = zlib.crc32(case.name.encode())
    narrow = case.depth > 128
    tile = Tile(
        block_m=16,
        block_n=(16, 32)[pick % 2],
        # Where key and value are one tensor, a token in one piece, without which it is not loaded once.
        block_d=min(power_of_two(case.depth), 512 if case.tied else (512 if narrow else 16, 32, 64)[pick % 3]),
        block_dv=min(power_of_two(case.value_depth), 512 if narrow or case.tied else (16, 32, 128)[pick // 18 % 3]),
        warps=4,
        stages=2,
    )
    many_requests = len(case.layout.targets) > 100
    return Plan(tile, parts=1 if many_requests else (1, 2, 3)[pick // 6 % 3], seconds=0.0)


def bulk_plan(case: Case) -> Plan:
    """The same parts and tokens a block, in bulk."""
    plan = small_plan(case)
    tile = replace(plan.tile, block_d=case.depth, block_dv=case.value_depth, bulk=True)
    return replace(plan, tile=tile)


def interpreted(case: Case, interpreter: Interpreter, source: Path | None = None, plan: Plan | None = None) -> Tensor:
    """The Triton kernels in Triton's interpreter, on outputs full of NaN."""
    x = inputs(case)
    out = torch.full((len(x.query), case.heads, case.value_depth), float("nan"), dtype=x.query.dtype)
    plan = plan or small_plan(case)
    steps = launch.launches(*x.tensors(), signed_scale(case), plan, out, *x.segments(), upcast=True)
    poison_parts(steps)
    launch.run_interpreted(steps, interpreter, source)
    return out
