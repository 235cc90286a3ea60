"""From tensors to kernel launches: which kernels, on what grid, with what arguments, in the order TensorRT passes them.

`launches` is the only place that says so; a GPU (`run_cuda`) or Triton's interpreter (`run_interpreted`) runs them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stca.plugins import tiling
from stca.plugins.aot import ALIGNMENT, FINISH, attend_constants, attend_grid, bulk_constants
from stca.plugins.devices import Device, device_for, scaled
from stca.plugins.interpret import KERNELS, Interpreter
from stca.plugins.spec import QUALIFIED_NAME
from stca.plugins.tiling import Plan, Shape, Sizes


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `arguments` are tensor inputs, int32 scalars, tensor outputs; None where it takes none.

    `module` has the kernel.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Tensor | int | None, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    module: str = "kernels"


def shape_of(query: Tensor, key: Tensor, value: Tensor, segments: bool = False) -> Shape:
    """What is compiled in for these tensors, with or without lists of segments.

    Raises:
        ValueError: for a head size, head count or dtype without a kernel, naming those that have one.
    """
    dtype = str(query.dtype).removeprefix("torch.")
    return Shape(query.shape[1], key.shape[1], query.shape[2], value.shape[2], dtype, _same(key, value), segments)


def sizes_of(query: Tensor, key: Tensor, target_offsets: Tensor) -> Sizes:
    """The counts that change from launch to launch."""
    return Sizes(query.shape[0], key.shape[0], target_offsets.shape[0] - 1)


def launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor,
    scale: float,
    plan: Plan,
    out: Tensor,
    segment_offsets: Tensor | None = None,
    segment_bias: Tensor | None = None,
    *,
    upcast: bool = False,
) -> list[Launch]:
    """The launches that fill `out` `(N_t, H, D_v)`: one, or with a split history one and the one that joins its parts.

    All tensors are contiguous; shapes and dtypes are those of `torch.ops.stca.target_history_attention`. Partial
    results are allocated here, uninitialised: what the second kernel reads, the first has written. Segments come with
    their bias, or neither.

    Raises:
        ValueError: for a shape without a kernel, or sizes beyond int32.
    """
    shape = shape_of(query, key, value, segment_offsets is not None)
    sizes = sizes_of(query, key, target_offsets)
    tiling.check_sizes(shape, sizes)
    if sizes.targets == 0:
        return []
    split = plan.parts > 1 or plan.tile.bulk
    outputs: tuple[Tensor, ...] = (out,)
    if split:
        rows = (plan.parts, sizes.targets, shape.heads)
        outputs = tuple(
            torch.empty((*rows, width), dtype=torch.float32, device=out.device) for width in (shape.value_depth, 2)
        )
    if plan.tile.bulk:
        plain = (query, key, value, target_offsets, history_offsets, history_lengths)
        return _bulk(plain, scale, plan, outputs, out, upcast)
    structure = (target_offsets, history_offsets, history_lengths, segment_offsets, segment_bias)
    segments = None if segment_offsets is None else len(history_lengths)
    attend = Launch(
        "attend_kernel",
        attend_grid(sizes.targets, sizes.requests, shape, plan.tile, plan.parts),
        (query, key, value, *structure, sizes.targets, sizes.tokens, sizes.requests, segments, *outputs),
        attend_constants(shape, plan.tile, scale, split, upcast=upcast),
        plan.tile.warps,
        plan.tile.stages,
    )
    if not split:
        return [attend]
    block_s, block_dv, warps = tiling.combine_block(shape)
    rows_out = sizes.targets * shape.heads
    combine = Launch(
        "combine_kernel",
        (rows_out, 1, 1),
        (*outputs, rows_out, plan.parts, out),
        {"D_V": shape.value_depth, "BLOCK_S": block_s, "BLOCK_DV": block_dv},
        warps,
        1,
    )
    return [attend, combine]


def _bulk(
    tensors: tuple[Tensor, ...], scale: float, plan: Plan, parts: tuple[Tensor, ...], out: Tensor, upcast: bool
) -> list[Launch]:
    """The two launches of `kernels_bulk.py`."""
    query, key, value, target_offsets, *_ = tensors
    shape, sizes, tile = shape_of(query, key, value), sizes_of(query, key, target_offsets), plan.tile
    counts = (sizes.targets, sizes.tokens, sizes.requests)
    attend_values, finish_values = bulk_constants(shape, tile, scale, upcast=upcast)
    attend = Launch(
        "attend_bulk_kernel",
        attend_grid(sizes.targets, sizes.requests, shape, tile, plan.parts),
        (*tensors, *counts, *parts),
        attend_values,
        tile.warps,
        tile.stages,
        "kernels_bulk",
    )
    finish = Launch(
        "finish_kernel",
        attend_grid(sizes.targets, sizes.requests, shape, FINISH, 1),
        (*tensors, *parts, *counts, plan.parts, out),
        finish_values,
        FINISH.warps,
        FINISH.stages,
        "kernels_bulk",
    )
    return [attend, finish]


def run_cuda(steps: list[Launch]) -> None:
    """Launch on the current stream of the tensors' device."""
    import triton

    for step in steps:
        options: dict[str, Any] = {"num_warps": step.warps, "num_stages": step.stages, "enable_fp_fusion": True}
        if step.module == "kernels_bulk":
            triton.set_allocator(_scratch)
            options["launch_pdl"] = step.kernel == "finish_kernel"  # before the one that it waits for has ended
        kernel = getattr(importlib.import_module(f"stca.plugins.{step.module}"), step.kernel)
        kernel[step.grid](*step.arguments, **step.constants, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a launch's descriptors; torch keeps it until the current stream, which launches, is done with it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def run_interpreted(steps: list[Launch], interpreter: Interpreter, source: Path | None = None) -> None:
    """Launch in Triton's interpreter; the tensors are CPU tensors, the launches were made with `upcast`."""
    for step in steps:
        at = source or KERNELS.with_name(f"{step.module}.py")
        interpreter.launch(step.kernel, step.grid, step.arguments, step.constants, at)


def device_of(tensor: Tensor) -> Device:
    """The cost model's view of the GPU a tensor lives on.

    Raises:
        ValueError: for a GPU before SM 80, naming the supported ones.
    """
    properties = torch.cuda.get_device_properties(tensor.device)
    return scaled(device_for(10 * properties.major + properties.minor), properties.multi_processor_count)


def _same(key: Tensor, value: Tensor) -> bool:
    return key.data_ptr() == value.data_ptr() and key.shape == value.shape and key.stride() == value.stride()


def _aligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous and at an address that wide loads take: Triton compiles another kernel for others."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def target_history_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target_offsets: Tensor,
    history_offsets: Tensor,
    history_lengths: Tensor | None,
    scale: float,
    segment_offsets: Tensor | None = None,
    segment_bias: Tensor | None = None,
) -> Tensor:
    """The operator on CUDA tensors; arguments as for `torch.ops.stca.target_history_attention`, already checked.

    Raises:
        ValueError: for a head size, dtype or GPU without a kernel, sizes beyond int32, or without Triton.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{QUALIFIED_NAME} on CUDA needs Triton: pip install triton") from error
    if history_lengths is None:
        history_lengths = history_offsets[1:] - history_offsets[:-1]
    tied = _same(key, value)
    query, key = _aligned(query), _aligned(key)
    value = key if tied else _aligned(value)
    shape, device = shape_of(query, key, value, segment_offsets is not None), device_of(query)
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    plan = tiling.choose(shape, sizes_of(query, key, target_offsets), device)
    structure = (_aligned(target_offsets), _aligned(history_offsets), _aligned(history_lengths))
    if segment_offsets is not None and segment_bias is None:
        segment_bias = torch.zeros(len(history_lengths), dtype=torch.float32, device=query.device)
    segments = tuple(None if x is None else _aligned(x) for x in (segment_offsets, segment_bias))
    with torch.cuda.device(query.device):
        run_cuda(launches(query, key, value, *structure, scale, plan, out, *segments))
    return out
