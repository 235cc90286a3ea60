"""The operator as TensorRT plugins whose kernels are compiled while the engine is built and live inside it.

Importing this module registers six Quickly Deployable Plugins in namespace `stca`; the machine that builds an engine
needs it, the machine that runs the engine does not.

* `TargetHistoryAttention`: the ONNX node as it is, one kernel, one pass over the history.
* `TargetHistoryAttentionTied`: the same where key and value are one tensor, which is then read once.
* `TargetHistoryAttentionParts` and `TargetHistoryAttentionJoin`: the history cut into parts that different blocks walk,
  then joined. Two nodes in a row, because such a plugin is one kernel and has no workspace.
* `TargetHistoryAttentionSegments` and `TargetHistoryAttentionSegmentsParts`: over lists of segments, two more inputs.

`stca.plugins.tensorrt_graph.prepare` puts the right ones into an ONNX model. A kernel gets its arguments in TensorRT's
order: input tensors, int32 values, output tensors. Floats cannot be passed, so `scale` is compiled in, and so are the
head counts and sizes, which must be static in the network.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any, Final, Literal

from stca.errors import BuildError
from stca.plugins import aot, tiling
from stca.plugins.spec import (
    ARGUMENTS,
    DOMAIN,
    OP_NAME,
    PLAIN,
    QUALIFIED_NAME,
    SCALE,
    TENSORRT_JOIN,
    TENSORRT_PARTS,
    TENSORRT_SEGMENTS,
    TENSORRT_SEGMENTS_PARTS,
    TENSORRT_TIED,
)

try:
    import tensorrt as trt
    import tensorrt.plugin as trtp
except ImportError as error:
    raise BuildError(f"the plugins need TensorRT's Python package ({error}): pip install tensorrt-cu13") from error

_DTYPES: Final = {trt.bfloat16: "bfloat16", trt.float16: "float16", trt.float32: "float32"}
_TENSORRT_DTYPES: Final = {name: dtype for dtype, name in _DTYPES.items()}
_ELEMENTS: Final = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}  # in the words of AutoTuneCombination
_ATTEND_INPUTS: Final = tuple(a.name for a in PLAIN)
_SEGMENTS_INPUTS: Final = tuple(a.name for a in ARGUMENTS)

# What `aot_impl` returns: kernel name, PTX, launch parameters, int32 arguments.
Launch = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
Tensors = Sequence[trtp.TensorDesc]
Attributes = dict[str, Any]


@dataclass
class Settings:
    """What engines built by this process are built for; change it before the build.

    Attributes:
        sm: compute capability of the GPU that will run the engine, 90 for 9.0; None means this machine's. With
            TensorRT's Ampere-and-later compatibility, set 80.
        shared_limit: shared memory that a tactic may use, bytes. Above 48 KiB TensorRT would have to raise the
            kernel's limit, and whether it does has not been tried.
        tactics: how many tiles TensorRT may time per node. It times them on offsets that are zeros or noise, which no
            history has: one, from the measured table or the cost model, is the better choice.
    """

    sm: int | None = None
    shared_limit: int = tiling.PORTABLE_SHARED_LIMIT
    tactics: int = 1


settings = Settings()


def target_sm() -> int:
    """The SM whose artifacts are built now.

    Raises:
        BuildError: when the GPU is too old, or none is named and none found.
    """
    if settings.sm is not None:
        return aot.artifact_sm(settings.sm)
    return aot.artifact_sm(_this_gpu())


@functools.cache
def _this_gpu() -> int:
    from stca.plugins.driver import device_sm

    try:
        return device_sm()
    except BuildError as error:
        raise BuildError(f"for which GPU? Set stca.plugins.tensorrt_plugin.settings.sm, as {error}") from error


def _check_types(inputs: Tensors) -> str:
    """The dtype of query, key and value. Raises BuildError when the inputs are not what the kernels take."""
    query, key, value, *_ = inputs
    if not query.dtype == key.dtype == value.dtype or query.dtype not in _DTYPES:
        given = ", ".join(str(desc.dtype).removeprefix("DataType.") for desc in (query, key, value))
        raise BuildError(
            f"{QUALIFIED_NAME}: query, key, value are {given}; supported is one of BF16, HALF, FLOAT for all"
        )
    expected = {"values": query.dtype, "structure": trt.int32, "logits": trt.float32}
    for argument, desc in zip(ARGUMENTS, inputs, strict=False):
        if desc.dtype != (wanted := expected[argument.kind]):
            names = (str(dtype).removeprefix("DataType.") for dtype in (desc.dtype, wanted))
            raise BuildError(
                f"{QUALIFIED_NAME}: {argument.name} is {'; supported is '.join(names)} (cast it in the network)"
            )
        if desc.ndim != (rank := len(argument.shape)):
            raise BuildError(f"{QUALIFIED_NAME}: {argument.name} has {desc.ndim} dimensions, expected {rank}")
    return _DTYPES[query.dtype]


def _static(name: str, expression: trtp.ShapeExpr) -> int:
    if not expression.is_constant:
        raise BuildError(
            f"{QUALIFIED_NAME}: {name} is dynamic; head counts and head sizes must be static in the network"
        )
    return int(expression.constant_value())


def _shape(inputs: Tensors, attributes: Attributes) -> tiling.Shape:
    """What is compiled in. Raises BuildError, naming what is supported."""
    dtype = _check_types(inputs)
    query, key, value = (desc.shape_expr for desc in inputs[:3])
    if _static("the value's head count", value[1]) != _static("the key's head count", key[1]):
        raise BuildError(f"{QUALIFIED_NAME}: key and value differ in head count")
    if _static("the key's head size", key[2]) != _static("the query's head size", query[2]):
        raise BuildError(f"{QUALIFIED_NAME}: key and query differ in head size")
    heads, key_heads = _static("the query's head count", query[1]), _static("the key's head count", key[1])
    depth, value_depth = _static("the query's head size", query[2]), _static("the value's head size", value[2])
    try:
        segments = len(inputs) > len(PLAIN)
        return tiling.Shape(heads, key_heads, depth, value_depth, dtype, bool(attributes["tied"]), segments)
    except ValueError as error:
        raise BuildError(str(error)) from error


def _describe_out(inputs: Tensors, attributes: Attributes) -> trtp.TensorDesc:
    """`out (N_t, H, D_v)` of the query's type."""
    _check_types(inputs)
    query, value = inputs[0].shape_expr, inputs[2].shape_expr
    if not query[0].is_fake:  # TensorRT asks for the outputs' types before it knows any shape
        _shape(inputs, attributes)
    return trtp.from_shape_expr((query[0], query[1], value[2]), dtype=inputs[0].dtype)


def _describe_parts(inputs: Tensors, attributes: Attributes) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    """`partial_out (S, N_t, H, D_v)` and `partial_stats (S, N_t, H, 2)`, both float32."""
    parts = attributes["parts"]
    if not 2 <= parts <= tiling.MAX_PARTS:
        raise BuildError(f"{TENSORRT_PARTS}: {parts} parts; supported are 2 to {tiling.MAX_PARTS}; 1 is {OP_NAME}")
    targets, heads, depth = _describe_out(inputs, attributes).shape_expr
    partial_out = trtp.from_shape_expr((parts, targets, heads, depth), dtype=trt.float32)
    return partial_out, trtp.from_shape_expr((parts, targets, heads, 2), dtype=trt.float32)


def _sizes(inputs: Tensors, bound: Literal["opt", "max"]) -> tiling.Sizes:
    """`N_t, N_h, B` that the build tunes for, or the most that the engine will take."""
    shapes = [inputs[i].shape for i in (0, 1, 3)]
    targets, tokens, ends = (int(getattr(shape, bound)[0] if shape.is_dynamic else shape[0]) for shape in shapes)
    return tiling.Sizes(targets, tokens, ends - 1)


@functools.cache
def candidates(shape: tiling.Shape, sm: int, shared_limit: int) -> tuple[tiling.Tile, ...]:
    """The tiles that tactics 1, 2, … stand for: the same in each call, whatever the sizes."""
    return tuple(tiling.tiles(shape, sm, shared_limit))


def _tune_attend(inputs: Tensors, attributes: Attributes) -> list[int]:
    """The tactics worth timing."""
    shape, sm, limit = _shape(inputs, attributes), target_sm(), settings.shared_limit
    try:
        tiling.check_sizes(shape, _sizes(inputs, "max"))
    except ValueError as error:
        raise BuildError(f"{error} (the most that the optimization profile allows)") from error
    scale, parts = attributes["scale"], attributes.get("parts", 1)
    best = aot.best_tiles(shape, scale, _sizes(inputs, "opt"), parts, sm, limit, settings.tactics)
    numbered = candidates(shape, sm, limit)
    return [numbered.index(tile) + 1 for tile in best]


def _launch_attend(inputs: Tensors, attributes: Attributes, tactic: int) -> Launch:
    shape, sm, parts = _shape(inputs, attributes), target_sm(), attributes.get("parts", 1)
    tile = candidates(shape, sm, settings.shared_limit)[tactic - 1]
    artifact = aot.compile_attend(shape, tile, sm, attributes["scale"], parts > 1)
    targets, tokens, ends, lengths = (inputs[i].shape_expr[0] for i in (0, 1, 3, 5))
    requests = ends - 1
    grid = aot.attend_grid(targets, requests, shape, tile, parts)
    return _launch(artifact, grid, (targets, tokens, requests, *([lengths] if shape.segments else [])))


def _describe_join(inputs: Tensors, attributes: Attributes) -> trtp.TensorDesc:
    """`out (N_t, H, D_v)` of the type that the attribute names."""
    name = attributes["dtype"]
    if name not in _TENSORRT_DTYPES:
        raise BuildError(f"{TENSORRT_JOIN}: dtype {name} is not supported; use one of {', '.join(_TENSORRT_DTYPES)}")
    _, targets, heads, depth = inputs[0].shape_expr
    return trtp.from_shape_expr((targets, heads, depth), dtype=_TENSORRT_DTYPES[name])


def _launch_join(inputs: Tensors, attributes: Attributes, tactic: int) -> Launch:
    parts, targets, heads, depth = inputs[0].shape_expr
    artifact = aot.compile_combine(_static("the value's head size", depth), attributes["dtype"], target_sm())
    return _launch(artifact, (targets * heads, 1, 1), (targets * heads, parts))


def _launch(artifact: aot.Artifact, grid: tuple[Any, ...], values: tuple[Any, ...]) -> Launch:
    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = grid
    params.block_x, params.shared_mem = artifact.threads, artifact.shared
    arguments = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(value) for value in values))
    return artifact.kernel, artifact.ptx, params, arguments


def _register(
    name: str,
    tensors: Sequence[str],
    attributes: dict[str, type],
    describe: Callable[[Tensors, Attributes], Any],
    tune: Callable[[Tensors, Attributes], list[int]],
    launch: Callable[[Tensors, Attributes, int], Launch],
    *,
    outputs: int = 1,
    constants: Attributes | None = None,
) -> None:
    """Register one plugin.

    TensorRT learns tensors and attributes from the signatures of three functions and then calls them by position. Here
    the signatures are made from `tensors` and `attributes`, so that each plugin is written down once.
    """
    constants = constants or {}
    described = GenericAlias(tuple, (trtp.TensorDesc,) * outputs)

    def signature(returns: Any, **more: Any) -> inspect.Signature:
        kinds = {**dict.fromkeys(tensors, trtp.TensorDesc), **attributes, **more}
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature(
            [inspect.Parameter(n, keyword, annotation=k) for n, k in kinds.items()], return_annotation=returns
        )

    def unpack(arguments: tuple[Any, ...]) -> tuple[Tensors, Attributes]:
        values = arguments[len(tensors) : len(tensors) + len(attributes)]
        return arguments[: len(tensors)], {**dict(zip(attributes, values, strict=True)), **constants}

    def on_describe(*inputs: trtp.TensorDesc, **given: Any) -> Any:
        return describe(inputs, {**given, **constants})

    def on_autotune(*arguments: Any) -> list[trtp.AutoTuneCombination]:
        inputs, values = unpack(arguments)
        types = ", ".join(_ELEMENTS.get(_DTYPES.get(desc.dtype, ""), "INT32") for desc in (*inputs, *arguments[-1]))
        return [trtp.AutoTuneCombination(types, "LINEAR", tune(inputs, values))]

    def on_launch(*arguments: Any) -> Launch:
        return launch(*unpack(arguments), arguments[-1])

    on_describe.__signature__ = signature(described)  # type: ignore[attr-defined]
    on_autotune.__signature__ = signature(list[trtp.AutoTuneCombination], outputs=described)  # type: ignore[attr-defined]
    on_launch.__signature__ = signature(Launch, outputs=described, tactic=int)  # type: ignore[attr-defined]
    trtp.register(f"{DOMAIN}::{name}")(on_describe)
    trtp.autotune(f"{DOMAIN}::{name}")(on_autotune)
    trtp.aot_impl(f"{DOMAIN}::{name}")(on_launch)


_attend = (_describe_out, _tune_attend, _launch_attend)
for _name, _tied in ((OP_NAME, False), (TENSORRT_TIED, True)):
    _register(_name, _ATTEND_INPUTS, {SCALE: float}, *_attend, constants={"tied": _tied})
_register(TENSORRT_SEGMENTS, _SEGMENTS_INPUTS, {SCALE: float, "tied": int}, *_attend)
_parts = {"scale": float, "parts": int, "tied": int}
for _name, _inputs in ((TENSORRT_PARTS, _ATTEND_INPUTS), (TENSORRT_SEGMENTS_PARTS, _SEGMENTS_INPUTS)):
    _register(_name, _inputs, _parts, _describe_parts, _tune_attend, _launch_attend, outputs=2)
_register(TENSORRT_JOIN, ("partial_out", "partial_stats"), {"dtype": str}, _describe_join, lambda *_: [1], _launch_join)
