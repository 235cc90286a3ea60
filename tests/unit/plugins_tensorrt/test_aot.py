"""Kernels compiled ahead of time: their parameters, and that they assemble for every SM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stca.errors import BuildError
from stca.plugins import aot, artifacts, tiling
from stca.plugins.devices import ARTIFACT_SMS, device_for
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Shape, Sizes, Tile

pytest.importorskip("triton", reason="compiling kernels needs Triton: pip install triton")

PROJECTED = Shape(4, 4, 64, 64, "bfloat16")
TIED = Shape(8, 1, 256, 256, "bfloat16", tied=True)
TENSORS_IN, TENSOR = ("u64",) * 6, ("u64",)


def entry_parameters(ptx: str) -> list[str]:
    """The types that the PTX itself declares."""
    declared = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    assert declared is not None
    return re.findall(r"\.param \.(u64|u32)", declared[1])


@pytest.mark.parametrize("sm", ARTIFACT_SMS)
def test_every_sm_assembles_and_takes_only_what_tensorrt_passes(sm: int) -> None:
    tile = Tile(16, 32, 64, 64, 4, 2)
    artifact = aot.compile_attend(PROJECTED, tile, sm, 0.125, split=True)
    assert artifact.parameters == (*TENSORS_IN, "u32", "u32", "u32", "u64", "u64")
    assert entry_parameters(artifact.ptx) == list(artifact.parameters)
    assert artifact.target == f"sm_{sm}" + ("a" if sm >= 90 else "")
    assert artifact.threads == 128
    assert 0 < artifact.shared <= PORTABLE_SHARED_LIMIT
    resources = aot.assemble(artifact)
    assert 0 < resources.registers <= 255
    assert resources.spill_stores == resources.spill_loads == 0


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_a_kernel_for_lists_of_segments_takes_them_behind_its_other_tensors_and_does_not_spill(sm: int) -> None:
    shape = Shape(16, 16, 64, 64, "bfloat16", segments=True)
    plan = tiling.choose(shape, Sizes(300, 10_000, 1), device_for(sm), PORTABLE_SHARED_LIMIT)
    artifact = aot.compile_attend(shape, plan.tile, sm, 0.125, split=True)
    assert artifact.parameters == (*TENSORS_IN, *TENSOR * 2, *("u32",) * 4, *TENSOR * 2)
    assert entry_parameters(artifact.ptx) == list(artifact.parameters)
    resources = aot.assemble(artifact)
    assert resources.spill_stores == resources.spill_loads == 0
    assert ("wgmma.mma_async" in artifact.ptx) == (sm == 90)


def test_tile_the_model_puts_first_assembles_without_spills_where_the_head_is_wide() -> None:
    sizes = Sizes(targets=300, tokens=10_000, requests=1)
    (tile,) = aot.best_tiles(TIED, 0.1, sizes, parts=2, sm=90, shared_limit=PORTABLE_SHARED_LIMIT, count=1)
    artifact = aot.compile_attend(TIED, tile, 90, 0.1, split=True)
    assert artifact.shared <= PORTABLE_SHARED_LIMIT
    assert aot.assemble(artifact).spill_stores == 0


def test_combine_kernel() -> None:
    artifact = aot.compile_combine(64, "float16", 80)
    assert artifact.parameters == ("u64", "u64", "u32", "u32", "u64")
    assert entry_parameters(artifact.ptx) == list(artifact.parameters)
    assert aot.assemble(artifact).registers > 0


def test_ptx_names_no_path_of_this_machine() -> None:
    ptx = aot.compile_attend(PROJECTED, Tile(16, 32, 64, 64, 4, 2), 80, 0.125, split=True).ptx
    assert "kernels.py" not in ptx
    assert str(Path(aot.__file__).parent) not in ptx


def test_wide_loads() -> None:
    """Without the promised alignment Triton would load element by element."""
    ptx = aot.compile_attend(PROJECTED, Tile(16, 32, 64, 64, 4, 2), 80, 0.125, split=False).ptx
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx) or "ld.global.v4" in ptx


@pytest.mark.parametrize(("sm", "own"), [(80, 80), (86, 86), (87, 80), (103, 80), (120, 120), (121, 80)])
def test_gpu_without_artifacts_of_its_own_takes_the_portable_ones(sm: int, own: int) -> None:
    assert aot.artifact_sm(sm) == own


def test_old_gpu_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(BuildError, match=r"SM 75: supported are 80, 86, 89, 90, 100, 120"):
        aot.artifact_sm(75)
    with pytest.raises(BuildError, match=r"SM 75: supported are 80"):
        aot.compile_combine(64, "float16", 75)


PTX = """.version 8.8
.target sm_80
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1,
	.param .u64 .ptr .global .align 1 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3
)
.reqntid 128
{
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b32 %r1, [k_param_1];
	ret;
}
"""


def test_hidden_parameters_are_stripped() -> None:
    stripped = aot.strip_hidden_parameters(PTX, "k", ("u64", "u32"))
    assert entry_parameters(stripped) == ["u64", "u32"]
    assert stripped.endswith(PTX[PTX.index(".reqntid") :])
    assert aot.strip_hidden_parameters(stripped, "k", ("u64", "u32")) == stripped


def test_hidden_parameter_that_is_read_is_an_error() -> None:
    reads = PTX.replace("ret;", "ld.param.b64 %rd2, [k_param_3];\n\tret;")
    with pytest.raises(BuildError, match="reads hidden parameter k_param_3"):
        aot.strip_hidden_parameters(reads, "k", ("u64", "u32"))


@pytest.mark.parametrize(
    "expected", [("u64",), ("u64", "u64"), ("u64", "u32", "u32"), ("u64", "u32", "u64", "u64", "u64")]
)
def test_other_parameters_than_expected_are_an_error(expected: tuple[str, ...]) -> None:
    with pytest.raises(BuildError, match="k has parameters u64, u32, u64, u64"):
        aot.strip_hidden_parameters(PTX, "k", expected)


def test_ptxas_complaint_becomes_the_error() -> None:
    broken = aot.Artifact("k", PTX, "sm_80", 128, 0, ("u64", "u32"))
    with pytest.raises(BuildError, match=r"ptxas refuses k for sm_80: "):
        aot.assemble(broken)


def test_command_is_run_as_a_module() -> None:
    command = [sys.executable, "-m", "stca.plugins.artifacts", "--help"]
    assert "--out DIR" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_command_writes_ptx_index_and_table(tmp_path: Path) -> None:
    assert artifacts.main(["--out", str(tmp_path), "--shape", "2,1,16,16", "--sm", "80"]) == 0
    index = json.loads((tmp_path / "artifacts.json").read_text())
    attend = [kernel for kernel in index["kernels"] if kernel["kernel"] == "attend_kernel"]
    assert {kernel["parts"] for kernel in attend} == {False, True}
    assert {kernel["scale"] for kernel in attend} == {0.25}
    for kernel in index["kernels"]:
        assert (tmp_path / kernel["file"]).read_text().startswith("//")
        assert kernel["registers"] > 0
        assert f'"{kernel["file"]}"' in (tmp_path / "artifacts.inc").read_text()
    assert len((tmp_path / "artifacts.md").read_text().splitlines()) == len(index["kernels"]) + 2


@pytest.mark.parametrize("shape", ["2,1,16", "2,1,x,16", "3,2,16,16", "2,2,1024,1024"])
def test_command_refuses_a_shape_without_kernels(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert artifacts.main(["--out", str(tmp_path), "--shape", shape]) == 2
    assert f"--shape {shape}: expected H,H_k,D,D_v[,scale]" in capsys.readouterr().err


def test_command_builds_kernels_for_lists_of_segments_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Shape] = []
    monkeypatch.setattr(artifacts, "build", lambda shapes, *_: asked.extend(shape for shape, _ in shapes) or iter(()))
    assert artifacts.main(["--out", str(tmp_path), "--shape", "2,1,16,16", "--segments"]) == 0
    assert [shape.segments for shape in asked] == [False, True]
