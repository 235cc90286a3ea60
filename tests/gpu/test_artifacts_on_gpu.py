"""The PTX that an engine would embed, launched on a GPU with the arguments that TensorRT would pass."""

from __future__ import annotations

import math

import pytest
import torch
from support import attention_cases

from stca.plugins import aot, ptx_launch
from stca.plugins.devices import device_for
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Shape, Sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]
pytest.importorskip("triton", reason="compiling kernels needs Triton: pip install triton")

CASES = [case for case in attention_cases.TABLE if sum(case.layout.targets)][::5]


def launch(case: attention_cases.Case, parts: int, sm: int, shared_limit: int) -> torch.Tensor:
    """The case's output from artifacts for `sm`, on outputs full of NaN."""
    x = attention_cases.inputs(case)
    on_gpu = [tensor.cuda() for tensor in x.tensors()]
    inputs = [tensor.data_ptr() for tensor in on_gpu]
    shape = Shape(case.heads, case.key_heads, case.depth, case.value_depth, case.dtype)
    sizes = Sizes(x.query.shape[0], x.key.shape[0], x.history_lengths.shape[0])
    scale = attention_cases.signed_scale(case)
    (tile,) = aot.best_tiles(shape, scale, sizes, parts, sm, shared_limit, count=1)
    attend = ptx_launch.LoadedKernel(aot.compile_attend(shape, tile, sm, scale, parts > 1))
    grid = aot.attend_grid(sizes.targets, sizes.requests, shape, tile, parts)
    out = torch.full((sizes.targets, shape.heads, shape.value_depth), math.nan, dtype=x.query.dtype, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    counts = (sizes.targets, sizes.requests)
    if parts == 1:
        attend.launch(grid, inputs, counts, [out.data_ptr()], stream)
        return out.cpu()
    rows = (parts, sizes.targets, shape.heads)
    partial = [torch.full((*rows, width), math.nan, device="cuda") for width in (shape.value_depth, 2)]
    addresses = [tensor.data_ptr() for tensor in partial]
    attend.launch(grid, inputs, counts, addresses, stream)
    join = ptx_launch.LoadedKernel(aot.compile_combine(shape.value_depth, shape.dtype, sm))
    n_rows = sizes.targets * shape.heads
    join.launch((n_rows, 1, 1), addresses, (n_rows, parts), [out.data_ptr()], stream)
    return out.cpu()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_own_artifacts(case: attention_cases.Case, parts: int) -> None:
    sm = aot.artifact_sm(ptx_launch.device_sm())
    attention_cases.check(case, launch(case, parts, sm, PORTABLE_SHARED_LIMIT))


@pytest.mark.parametrize("case", CASES[::8], ids=lambda case: case.name)
def test_portable_artifacts(case: attention_cases.Case) -> None:
    attention_cases.check(case, launch(case, 2, aot.FALLBACK_SM, PORTABLE_SHARED_LIMIT))


def test_more_shared_memory_than_the_default_limit() -> None:
    sm = aot.artifact_sm(ptx_launch.device_sm())
    case = attention_cases.Case(attention_cases.Layout("large-tile", (300,), (2000,)), 2, 1, 256, 256, "bfloat16")
    attention_cases.check(case, launch(case, 2, sm, device_for(sm).shared_limit))
