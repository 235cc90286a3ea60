"""The PTX that an engine would embed, launched on a GPU with the arguments that TensorRT would pass."""

from __future__ import annotations

import math

import pytest
import torch
from support import attention_cases

from stca.plugins import aot, driver, ptx_launch
from stca.plugins.devices import device_for
from stca.plugins.launch import launches
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Plan, Sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]
pytest.importorskip("triton", reason="compiling kernels needs Triton: pip install triton")

CASES = [case for case in attention_cases.TABLE if sum(case.layout.targets)][::5]


def launch(case: attention_cases.Case, parts: int, sm: int, shared_limit: int) -> torch.Tensor:
    """The case's output from artifacts for `sm`, on outputs full of NaN."""
    x = attention_cases.inputs(case).cuda()
    sizes, scale = Sizes(len(x.query), len(x.key), len(x.target_offsets) - 1), attention_cases.signed_scale(case)
    (tile,) = aot.best_tiles(case.shape, scale, sizes, parts, sm, shared_limit, count=1)
    plan = Plan(tile, parts, 0.0)
    out = torch.full((sizes.targets, case.heads, case.value_depth), math.nan, dtype=x.query.dtype, device="cuda")
    steps = launches(*x.tensors(), scale, plan, out, *x.segments())
    attention_cases.poison_parts(steps)
    ptx_launch.run(steps, ptx_launch.load(case.shape, plan, sm, scale), torch.cuda.current_stream().cuda_stream)
    return out.cpu()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_own_artifacts(case: attention_cases.Case, parts: int) -> None:
    sm = aot.artifact_sm(driver.device_sm())
    attention_cases.check(case, launch(case, parts, sm, PORTABLE_SHARED_LIMIT))


@pytest.mark.parametrize("case", CASES[::8], ids=lambda case: case.name)
def test_portable_artifacts(case: attention_cases.Case) -> None:
    attention_cases.check(case, launch(case, 2, aot.FALLBACK_SM, PORTABLE_SHARED_LIMIT))


def test_more_shared_memory_than_the_default_limit() -> None:
    sm = aot.artifact_sm(driver.device_sm())
    case = attention_cases.Case(attention_cases.Layout("large-tile", (300,), (2000,)), 2, 1, 256, 256, "bfloat16")
    attention_cases.check(case, launch(case, 2, sm, device_for(sm).shared_limit))
