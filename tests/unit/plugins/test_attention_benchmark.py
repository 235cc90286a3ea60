"""What of the GPU benchmark runs without a GPU: which cases its parity covers, and that no measured row is lost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stca.plugins import tile_table, tiling, torch_op
from stca.plugins.tiling import Plan, Sizes, Tile

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SIZES = ((32, 2),)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention_cuda

    return attention_cuda  # type: ignore[no-any-return]


@pytest.fixture
def parity(cuda: ModuleType) -> ModuleType:
    import attention_parity

    return attention_parity  # type: ignore[no-any-return]


def test_parity_covers_each_layout_dtype_and_form(parity: ModuleType) -> None:
    *_, result = parity.parity(SIZES, "cpu", lambda: False)
    names = [check["case"] for check in result["checks"]]
    assert len(set(names)) == len(names) == len(parity.LAYOUTS) * 3 * 2
    for layout, dtype, form in itertools.product(parity.LAYOUTS, ("bfloat16", "float16", "float32"), parity.FORMS):
        assert any(n.startswith(f"{layout}, {form}") and n.endswith(dtype) for n in names)
    lengths = {length for _, lengths in parity.LAYOUTS.values() for length in lengths}
    assert {0, 1, 10_000} <= lengths
    assert result["passed"]
    assert result["skipped_for_time"] == 0


def test_parity_notices_a_wrong_operator_and_says_what_it_skipped(
    parity: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LAYOUTS", {"small": ((3,), (40,))})
    right = torch_op.eager
    monkeypatch.setattr(torch_op, "eager", lambda *x: right(*x) * (1 if x[0].dtype == torch.float64 else 1.02))
    *_, result = parity.parity(SIZES, "cpu", lambda: False)
    assert not any(check["passed"] for check in result["checks"])
    assert not result["passed"]
    (result,) = parity.parity(SIZES, "cpu", lambda: True)
    assert (result["passed"], result["skipped_for_time"]) == (False, 6)


class _LostGpu(Exception):
    pass


def test_a_lost_gpu_loses_no_tuned_row_and_the_next_run_goes_on(
    cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "tiles.json"
    elsewhere = Plan(Tile(16, 32, 64, 64, 4, 2), 2, 1e-5)
    tile_table.record(table, 80, tiling.Shape(8, 8, 64, 64, "float16"), Sizes(8, 512, 1), elsewhere)
    cases = [("projected", (256, 8), 512, m) for m in (1, 8, 32, 128)]
    measured: list[int] = []

    def fastest(case: tuple[str, tuple[int, int], int, int], clock: object) -> Plan:
        if len(measured) == 2 and not resumed:
            raise _LostGpu
        measured.append(case[3])
        return Plan(Tile(16, 32, 32, 32, 4, 2), 1, 1e-6 * case[3])

    def run() -> list[dict[str, Any]]:
        return list(cuda._tune(table, cases, {"sm": 90}, cuda._Clock(60)))

    monkeypatch.setattr(cuda, "_case", lambda *case: (case[0], case[1:3], *case[3:]))
    monkeypatch.setattr(cuda, "_fastest", fastest)
    resumed = False
    with pytest.raises(_LostGpu):
        run()
    assert measured == [1, 8]
    assert len(json.loads(table.read_text())) == 3
    resumed = True
    run()
    assert measured == [1, 8, 32, 128, 1, 8]
    rows = json.loads(table.read_text())
    assert [(row["sm"], row["sizes"]["targets"]) for row in rows] == [(80, 8), (90, 1), (90, 8), (90, 32), (90, 128)]
    assert tile_table.read_plans(table)[80, tiling.Shape(8, 8, 64, 64, "float16"), Sizes(8, 512, 1)].parts == 2
