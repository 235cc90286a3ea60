"""The cost model: what it offers fits and compiles, what it chooses makes sense, and a measured table overrules it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from stca.errors import BuildError
from stca.plugins import aot, tile_table, tiling
from stca.plugins.devices import ARTIFACT_SMS, device_for
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Plan, Shape, Sizes, Tile

PROJECTED = Shape(16, 16, 64, 64, "bfloat16")
ABSORBED = Shape(8, 1, 256, 256, "bfloat16", tied=True)
SHAPES = [
    Shape(8, form, depth, depth, dtype)
    for form in (1, 8)
    for depth in (16, 64, 80, 256, 512)
    for dtype in ("bfloat16", "float32")
] + [Shape(16, 1, 1024, 1024, dtype) for dtype in tiling.DTYPE_BYTES]


@given(
    targets=st.lists(st.integers(0, 70), min_size=1, max_size=20),
    group=st.integers(1, 16),
    block=st.sampled_from([16, 32, 64, 128]),
    parts=st.integers(1, 4),
)
def test_the_grid_has_a_tile_for_every_row_of_a_ragged_batch(
    targets: list[int], group: int, block: int, parts: int
) -> None:
    """No request shares a tile with another, so each may need one more than its rows fill; not two."""
    shape, tile = Shape(group, 1, 64, 64, "float32"), Tile(block, 16, 64, 64, 4, 2)
    tiles, columns, layers = aot.attend_grid(sum(targets), len(targets), shape, tile, parts)
    needed = sum(-(-m * group // block) for m in targets)
    assert needed <= tiles <= needed + len(targets)
    assert (columns, layers) == (1, parts)


@pytest.mark.parametrize("sm", ARTIFACT_SMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_supported_shape_has_a_plan(shape: Shape, sm: int) -> None:
    device = device_for(sm)
    plan = tiling.choose(shape, Sizes(300, 10_000, 1), device)
    assert tiling.shared_bytes(shape, plan.tile, sm) <= device.shared_limit
    if shape.depth <= 512:
        portable = tiling.choose(shape, Sizes(300, 10_000, 1), device, PORTABLE_SHARED_LIMIT)
        assert tiling.shared_bytes(shape, portable.tile, sm) <= PORTABLE_SHARED_LIMIT


def test_few_tiles_are_split_and_many_are_not() -> None:
    device = device_for(90)
    assert tiling.choose(PROJECTED, Sizes(8, 10_000, 1), device).parts > 1
    assert tiling.choose(PROJECTED, Sizes(300, 10_000, 1), device).parts > 1
    assert tiling.choose(PROJECTED, Sizes(300 * 64, 10_000 * 64, 64), device).parts == 1
    assert tiling.choose(PROJECTED, Sizes(300, 16, 1), device).parts == 1


def test_rows_of_a_tile_follow_the_number_of_targets() -> None:
    device = device_for(90)
    limit = device.shared_limit
    assert tiling.choose(PROJECTED, Sizes(8, 10_000, 1), device, limit).tile.block_m == 16
    assert tiling.choose(PROJECTED, Sizes(1024, 10_000, 1), device, limit).tile.block_m >= 64
    assert tiling.choose(ABSORBED, Sizes(1, 10_000, 1), device).tile.block_m == 16
    assert tiling.choose(ABSORBED, Sizes(300, 10_000, 1), device).tile.block_m >= 64


def test_nearby_sizes_share_a_plan() -> None:
    plans = {tiling.choose(PROJECTED, Sizes(300, 10_000 + i, 1), device_for(90)) for i in range(0, 240, 7)}
    assert len(plans) == 1


def test_a_measured_plan_overrules_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(320, 10_240, 1)
    device = device_for(90)
    second = tiling.rank(PROJECTED, sizes, device, device.shared_limit)[1]
    row = {
        "sm": 90,
        "shape": dataclasses.asdict(PROJECTED),
        "sizes": dataclasses.asdict(sizes),
        "tile": dataclasses.asdict(second.tile),
        "parts": 3,
        "seconds": 1e-5,
    }
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps([row]))
    monkeypatch.setattr(tiling, "MEASURED_TABLE", table)
    tiling._choose.cache_clear()
    try:
        plan = tiling.choose(PROJECTED, Sizes(300, 10_000, 1), device)
        assert (plan.tile, plan.parts, plan.measured) == (second.tile, 3, True)
        assert not tiling.choose(PROJECTED, Sizes(8, 10_000, 1), device).measured
    finally:
        tiling._choose.cache_clear()


def test_a_recorded_plan_joins_the_table_and_replaces_only_its_own_row(tmp_path: Path) -> None:
    table, sizes = tmp_path / "tiles.json", Sizes(300, 10_000, 1)
    first, second = (Plan(Tile(64, 64, 64, 64, 4, stages), 5, 1e-5) for stages in (2, 3))
    tile_table.record(table, 90, PROJECTED, sizes, first)
    tile_table.record(table, 80, PROJECTED, sizes, first)
    tile_table.record(table, 90, ABSORBED, Sizes(8, 10_000, 1), first)
    before = tile_table.read_plans(table)
    tile_table.record(table, 90, PROJECTED, sizes, second)
    after = tile_table.read_plans(table)
    key = (90, PROJECTED, tiling.rounded(sizes))
    assert after == {**before, key: dataclasses.replace(second, measured=True)} != before
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(("shape", "sm"), [(PROJECTED, 80), (PROJECTED, 90), (ABSORBED, 90)], ids=str)
def test_the_chosen_tile_compiles_within_the_shared_memory_the_model_counted(shape: Shape, sm: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    device = device_for(sm)
    tile = tiling.choose(shape, Sizes(300, 10_000, 1), device).tile
    if tile.bulk:
        artifact, _ = aot.compile_bulk(shape, tile, sm, 0.125)
    else:
        artifact = aot.compile_attend(shape, tile, sm, 0.125, True)
    assert artifact.threads == 32 * tile.warps * (3 if tile.bulk else 1)
    assert artifact.shared <= 1.05 * tiling.shared_bytes(shape, tile, sm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 64, 64, "float64"), "dtype float64 is not supported; use one of bfloat16, float16, float32"),
        ((8, 8, 24, 64, "float16"), "D = 24 is not supported; the kernels take multiples of 16 from 16 to 512"),
        ((8, 8, 64, 1024, "float16"), r"D_v = 1024 is not supported; .* to 1024 with one key head"),
        ((8, 1, 2048, 64, "float16"), "D = 2048 is not supported"),
        ((8, 2, 64, 64, "float16"), "2 key heads for 8 heads; use 1 or 8"),
        ((4097, 1, 64, 64, "float16"), "4097 heads are not supported; use 1 to 4096"),
        ((8, 1, 64, 32, "float16", True), "tied key and value differ in head size: 64, 32"),
    ],
)
def test_unsupported_shapes_are_refused_by_name(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(*arguments)  # type: ignore[arg-type]


def test_unsupported_gpus_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"SM 75 is not supported; .* SM 80 or later .* 80, 86, 89, 90, 100, 120"):
        device_for(75)
    assert device_for(87).sm == 86
    with pytest.raises(ValueError, match=r"no tile of .* fits 1000 bytes of shared memory on SM 90"):
        tiling.choose(PROJECTED, Sizes(1, 1, 1), device_for(90), 1000)


def test_few_rows_of_many_requests_do_not_take_the_smallest_tile_because_bytes_are_the_floor_of_all() -> None:
    tile = tiling.choose(PROJECTED, Sizes(512, 640_000, 64), device_for(90)).tile
    assert (tile.block_m, tile.block_n) != (16, 16)
    assert tile.stages == 4


def test_shared_memory_bounds_a_wide_head_on_narrow_instructions() -> None:
    """Counted in machine code: 166 loads of 512 bytes a warp, 8 warps, for 16 tokens of the absorbed form at 1024."""
    shape, tile = Shape(16, 1, 1024, 1024, "bfloat16", tied=True), Tile(32, 16, 64, 512, 8, 2)
    assert 0.5 < tiling.shared_traffic(shape, tile, 90) / (166 * 512 * 8) < 1
    device, sizes = device_for(90), Sizes(8, 10_000, 1)
    slower = dataclasses.replace(device, exponentials=device.exponentials / 2)  # half the clock
    assert tiling.seconds(shape, sizes, tile, 16, slower) > 1.5 * tiling.seconds(shape, sizes, tile, 16, device)


def test_two_warp_groups_over_64_rows_do_their_products_twice() -> None:
    sizes, device = Sizes(64 * 16, 100_000, 1), device_for(90)
    four, eight = (tiling.seconds(PROJECTED, sizes, Tile(64, 64, 64, 64, w, 2), 1, device) for w in (4, 8))
    assert eight > 1.2 * four


def test_copies_in_bulk_are_for_sm_90_and_never_for_an_engine() -> None:
    many = Sizes(300, 10_000, 1)
    assert tiling.choose(PROJECTED, many, device_for(90)).tile.bulk
    assert not tiling.choose(PROJECTED, many, device_for(90), device_for(90).shared_limit).tile.bulk
    assert not any(tiling.bulk_tiles(PROJECTED, sm) for sm in (80, 86, 89, 100, 120))
    assert not tiling.bulk_tiles(Shape(16, 16, 64, 64, "float32"), 90)
    assert not tiling.bulk_tiles(Shape(16, 16, 64, 128, "bfloat16"), 90)
    assert not tiling.bulk_tiles(dataclasses.replace(PROJECTED, segments=True), 90)
    tile = tiling.bulk_tiles(PROJECTED, 90)[0]
    with pytest.raises(BuildError, match="needs scratch memory, which TensorRT does not bring"):
        aot.compile_attend(PROJECTED, tile, 90, 0.125, True)


def test_a_measured_plan_in_bulk_is_for_launches_that_bring_scratch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, device = Sizes(300, 10_000, 1), device_for(90)
    tile = tiling.bulk_tiles(PROJECTED, 90)[0]
    tile_table.record(table := tmp_path / "tiles.json", 90, PROJECTED, sizes, Plan(tile, 3, 1e-5))
    monkeypatch.setattr(tiling, "MEASURED_TABLE", table)
    tiling._choose.cache_clear()
    try:
        assert tiling.choose(PROJECTED, sizes, device) == Plan(tile, 3, 1e-5, measured=True)
        assert not tiling.choose(PROJECTED, sizes, device, device.shared_limit).measured
    finally:
        tiling._choose.cache_clear()


def test_memory_is_no_faster_than_what_the_blocks_wait_for_at_a_time() -> None:
    """One block that holds 2 KiB on its way gets 2 KiB in the time of one access, whatever the memory could give."""
    sizes, device = Sizes(8, 10_000, 1), device_for(90)
    floors = [
        tiling._attend_seconds(PROJECTED, sizes, Tile(16, 16, 64, 64, 4, stages), 1, device)[1] for stages in (2, 3, 4)
    ]
    moved = 2 * (8 * 16 * 128 + 10_000 * 16 * 128)
    assert floors[0] == pytest.approx(moved / (16 * 16 * 128 * 2 / tiling.MEMORY_LATENCY))
    assert floors[0] > floors[1] > floors[2] > moved / device.bandwidth
