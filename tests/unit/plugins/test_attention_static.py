"""The static proof: what is counted, what is a complaint, and the headline kernel against the table kept here."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stca.plugins import aot, tiling
from stca.plugins.devices import device_for

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   LDSM.16.M88 R8, [R3] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8], R24 ;
        /*0070*/              @P2  MUFU.EX2 R5, R6 ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R10.64] ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention_static

    return attention_static  # type: ignore[no-any-return]


def test_the_loop_with_most_products_is_the_one_that_counts(static: ModuleType) -> None:
    _, loop = static.loops(SASS)
    assert loop[0].startswith("LDSM.16.M88.4")
    assert len(loop) == 7
    assert static.counts(loop) == {"HGMMA.64x64x16": 2, "LDGSTS": 1, "LDSM": 2, "MUFU": 1}
    # Of a warp: four matrices and one, both operands by four warps together, the right one alone, 16 bytes a thread.
    assert [static._shared_bytes(x) for x in loop] == [512, 128, 1024, 512, 0, 512, 0]


def test_a_loop_around_another_is_not_the_main_loop(static: ModuleType) -> None:
    outer = SASS.replace("        /*0000*/", ".L_x_2:\n        /*0000*/").replace("EXIT ;", "@P3 BRA `(.L_x_2) ;")
    assert static.loops(outer) == static.loops(SASS)


def row(**changes: Any) -> dict[str, Any]:
    tile = {"block_m": 128, "block_n": 64, "warps": 8}
    counts = {"HGMMA.64x64x16": 8, "UTMALDG": 1}
    return {"case": "c", "sm": 90, **tile, "instructions": 300, "counts": counts, "spilled": 0, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": {"HMMA.16816": 64, "UTMALDG": 1}}, "lost HGMMA"),
        ({"counts": {"HGMMA.64x64x16": 8}}, "lost UTMALDG"),
        ({"spilled": 8}, "spills 8 bytes, 0 before"),
        ({"instructions": 330}, "1320 issue slots per 128 x 128, 1200 before"),
        ({"block_n": 32}, "2400 issue slots"),
    ],
)
def test_what_got_worse_is_told(static: ModuleType, changes: dict[str, Any], said: str) -> None:
    (complaint,) = static.complaints(row(**changes), row())
    assert complaint.startswith("SM 90, c: ")
    assert said in complaint


def test_what_got_better_is_fine_and_what_is_new_must_be_written_down(static: ModuleType) -> None:
    assert static.complaints(row(instructions=200, spilled=0), row(spilled=4)) == []
    assert "is not in the table" in static.complaints(row(), None)[0]


@pytest.mark.parametrize(("sm", "products", "number"), [(90, "HGMMA", 0), (80, "HMMA", 0), (90, "HGMMA", -1)])
def test_the_headline_kernel_is_what_the_table_says(static: ModuleType, sm: int, products: str, number: int) -> None:
    """On a machine with another compiler this shows what that one loses."""
    case = static.CASES[number]
    table = {(r["case"], r["sm"]): r for r in json.loads(static.TABLE.read_text())["rows"]}
    kept = table[case.name, sm]
    assert any(name.startswith(products) for name in kept["counts"])
    plan = tiling.choose(case.shape, case.sizes, device_for(sm), case.limit)
    found = {
        "case": case.name,
        "sm": sm,
        **vars(plan.tile),
        "parts": plan.parts,
        **static.counted(case.shape, plan, sm),
    }
    assert static.complaints(found, kept) == []
    at = static.bound(case, plan, found, device_for(sm))
    assert 0.1 < at["floor"] / at["seconds"] < 1
    assert max(at[unit] for unit in static._UNITS) < 10_000


def test_the_kernel_that_joins_waits_for_the_parts_before_it_reads_them(static: ModuleType) -> None:
    """It is launched while they are written, which no interpreter shows."""
    case = static.CASES[0]
    tile = tiling.choose(case.shape, case.sizes, device_for(90)).tile
    attend, finish = aot.compile_bulk(case.shape, tile, 90, 0.125)
    assert (attend.threads, attend.parameters[-1], attend.scratch > 0) == (384, "u64", True)
    before, waits, after = finish.ptx.partition("griddepcontrol.wait")
    assert waits
    for part in ("[finish_kernel_param_6]", "[finish_kernel_param_7]"):  # the addresses of the parts
        assert part not in before
        assert part in after


@pytest.mark.parametrize("module", ["kernels", "kernels_bulk"])
def test_kernels_take_no_tuple_apart_inside_another(module: str) -> None:
    """Triton 3.6 fails on one when a process compiles the kernel for the first time: "unhashable type: 'list'"."""
    tree = ast.parse((BENCHMARKS.parent / "plugins" / f"{module}.py").read_text())
    targets = [t for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
    tuples = [t for t in targets if isinstance(t, ast.Tuple)]
    assert tuples
    assert [t.lineno for t in tuples if any(isinstance(x, ast.Tuple) for x in t.elts)] == []
