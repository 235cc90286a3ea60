"""The kernels on a GPU: the table of all implementations, every plan the cost model may choose, and large tensors."""

from __future__ import annotations

import os

import pytest
import torch
from support.attention_cases import TABLE, Case, check, inputs, poison_parts, signed_scale
from torch import Tensor

from stca.plugins import launch, tiling, torch_op
from stca.plugins.tiling import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none"),
]

# Each tile is a kernel to compile, for seconds: unless told otherwise, some tiles for some cases, other ones each time.
FULL = bool(os.environ.get("STCA_FULL_TABLE"))
PLAN_CASES = [case for case in TABLE if case.layout.name in ("three", "starts-off-block", "padded", "pages")]
PLAN_CASES = PLAN_CASES if FULL else PLAN_CASES[::4]


def on_gpu(case: Case) -> tuple[Tensor, ...]:
    return inputs(case).cuda().tensors()


def poison() -> None:
    """Leave NaN where the allocator will take the next tensors from."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        torch.full((size,), float("nan"), device="cuda")


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_operator(case: Case) -> None:
    x = inputs(case).cuda()
    poison()
    check(case, torch.ops.stca.target_history_attention(*x.tensors(), signed_scale(case), *x.segments()).cpu())


@pytest.mark.parametrize("case", PLAN_CASES, ids=lambda case: case.name)
def test_every_candidate_tile(case: Case) -> None:
    """The tiles that the model may choose on this GPU, whole and split."""
    x = inputs(case).cuda()
    query, key, value, *structure = x.tensors()
    shape, device = launch.shape_of(query, key, value, bool(x.segments())), launch.device_of(query)
    tiles = [tile for tile in tiling.tiles(shape, device.sm, device.shared_limit) if tile.stages in (1, 3)]
    if not FULL:
        step = max(1, len(tiles) // 8)
        tiles = tiles[PLAN_CASES.index(case) % step :: step]
    for i, tile in enumerate(tiles):
        out = torch.full((*query.shape[:2], value.shape[2]), float("nan"), dtype=query.dtype, device="cuda")
        plan = Plan(tile, 1 + i % 4, 0.0)
        steps = launch.launches(query, key, value, *structure, signed_scale(case), plan, out, *x.segments())
        poison_parts(steps)
        launch.run_cuda(steps)
        check(case, out.cpu())


def test_parts_that_are_never_written_are_noticed() -> None:
    """The join without the launch that fills what it joins: without the poison it might find old results there."""
    case = next(case for case in PLAN_CASES if case.dtype == "float32" and not case.layout.lists)
    query, key, value, *structure = on_gpu(case)
    shape, device = launch.shape_of(query, key, value), launch.device_of(query)
    tile = next(tiling.tiles(shape, device.sm, device.shared_limit))
    out = torch.full((*query.shape[:2], value.shape[2]), float("nan"), dtype=query.dtype, device="cuda")
    steps = launch.launches(query, key, value, *structure, signed_scale(case), Plan(tile, 3, 0.0), out)
    launch.run_cuda(steps)
    check(case, out.cpu())
    poison_parts(steps)
    launch.run_cuda(steps[1:])
    with pytest.raises(AssertionError, match="not finite"):
        check(case, out.cpu())


def test_one_load_serves_key_and_value() -> None:
    """Key and value in one tensor take another path through the kernel, to the same result."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (torch.randn(n, h, 256, generator=generator, device="cuda").half() for n, h in ((40, 8), (999, 1)))
    structure = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 40], [0, 999], [990])]
    assert launch.shape_of(query, key, key).tied
    tied = torch.ops.stca.target_history_attention(query, key, key, *structure, 0.0625)
    apart = torch.ops.stca.target_history_attention(query, key, key.clone(), *structure, 0.0625)
    torch.testing.assert_close(tied, apart, rtol=2e-3, atol=2e-3)


def test_offsets_beyond_two_to_the_31st_element() -> None:
    tokens, heads, depth = (1 << 21) + 500, 16, 64
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    key = torch.randn(tokens, heads, depth, device="cuda", dtype=torch.bfloat16)
    value = key.clone()
    query = torch.randn(6, heads, depth, device="cuda", dtype=torch.bfloat16)
    ends = ([0, 3, 6], [0, tokens - 400, tokens], [100, 400])
    structure = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ends]
    out = torch.ops.stca.target_history_attention(query, key, value, *structure, 0.125)
    last = slice(tokens - 400, tokens)
    single = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 3], [0, 400], [400])]
    expected = torch_op.eager(query[3:], key[last], value[last], *single, 0.125)
    torch.testing.assert_close(out[3:], expected, rtol=2e-2, atol=2e-2)


def test_wrong_offsets_touch_only_the_tensors() -> None:
    """Also with NaN around them; and a later launch still works, which it would not after an illegal access."""
    tokens, heads, depth = 100, 4, 64
    block = torch.full((3 * tokens, 1, depth), float("nan"), device="cuda", dtype=torch.float16)
    key = block[tokens : 2 * tokens]
    key[:] = torch.randn(key.shape, device="cuda")
    query = torch.randn(7, heads, depth, device="cuda").half()
    most = 2**31 - 1
    for ends in (
        ([0, 9, -20, 7], [-50, 90, 130, 300], [60, most, 150]),
        ([5, most, -most, most], [most, -most, 3, -1], [most, most, -1]),
    ):
        structure = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ends]
        out = torch.ops.stca.target_history_attention(query, key, key, *structure, 0.125)
        assert out.shape == query.shape
        torch.cuda.synchronize()
    right = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 7], [0, tokens], [tokens])]
    out = torch.ops.stca.target_history_attention(query, key, key, *right, 0.125)
    torch.testing.assert_close(out, torch_op.eager(query, key, key, *right, 0.125), rtol=2e-2, atol=2e-2)


def test_no_request_with_rows_is_refused() -> None:
    query = torch.randn(3, 4, 64, device="cuda")
    none = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0], [0], [])]
    with pytest.raises(ValueError, match="target_offsets has 1 entry, so no request, for 3 rows"):
        torch.ops.stca.target_history_attention(query, query[:0], query[:0], *none, 1.0)


def test_compiled_and_captured() -> None:
    case = next(case for case in TABLE if case.layout.name == "three" and case.dtype == "bfloat16")
    tensors, scale = on_gpu(case), signed_scale(case)

    def call() -> Tensor:
        out: Tensor = torch.ops.stca.target_history_attention(*tensors, scale)
        return out

    expected = call()
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(), expected, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def test_refusals_name_what_is_supported() -> None:
    query, key, value, *structure = on_gpu(TABLE[0])
    with pytest.raises(ValueError, match="dtype float64 is not supported; use one of bfloat16, float16, float32"):
        torch.ops.stca.target_history_attention(query.double(), key.double(), value.double(), *structure, 1.0)
    narrow = [x[..., :8] for x in (query, key, value)]
    with pytest.raises(ValueError, match="D = 8 is not supported; the kernels take multiples of 16"):
        torch.ops.stca.target_history_attention(*narrow, *structure, 1.0)
