"""The launcher, up to the driver: on a CPU a recording driver takes the driver's place, and no kernel runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stca.errors import BuildError
from stca.plugins import aot, driver, ptx_launch

ARTIFACT = aot.Artifact("k", "", "sm_80", 128, 0, ("u64", "u64", "u32", "u64"))


def test_arguments_in_order_with_their_types() -> None:
    values, types = ptx_launch.arguments(ARTIFACT, [16, 32], [7], [48])
    assert values == (16, 32, 7, 48)
    assert [t.__name__ for t in types] == ["c_void_p", "c_void_p", "c_int", "c_void_p"]


def test_wrong_count_alignment_or_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k takes \(u64, u64, u32, u64\); given were \(u64, u32, u64\)"):
        ptx_launch.arguments(ARTIFACT, [16], [7], [48])
    with pytest.raises(ValueError, match="0x12 is not a multiple of 16"):
        ptx_launch.arguments(ARTIFACT, [16, 18], [7], [48])
    with pytest.raises(ValueError, match="2147483648 is not an int32"):
        ptx_launch.arguments(ARTIFACT, [16, 32], [2**31], [48])


SCRIPT = """
from stca.plugins import aot, driver, ptx_launch
ptx = ".visible .entry k(\\n.param .u64 a,\\n.param .u64 b,\\n.param .u32 c,\\n.param .u64 d\\n)\\n{}"
artifact = aot.Artifact("k", ptx, "sm_90a", 128, 60000, ("u64", "u64", "u32", "u64"))
print("sm", driver.device_sm())
ptx_launch.LoadedKernel(artifact).launch((5, 6, 7), [16, 32], [-3], [48], stream=0)
try:
    ptx_launch.LoadedKernel(aot.Artifact("k", "text", "sm_90a", 128, 0, ()))
except Exception as error:
    print(type(error).__name__, error)
"""


# What TensorRT would be told to launch for a history in three parts, first as it is expected, then as it is launched.
OPERATOR = """
import torch
from stca.plugins import aot, driver, launch, ptx_launch
from stca.plugins.tiling import Plan, Tile
query, key, out = torch.zeros(5, 2, 64), torch.zeros(40, 1, 64), torch.zeros(5, 2, 64)
structure = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 30, 40], [30, 10])]
plan = Plan(Tile(16, 16, 64, 64, 8, 1), 3, 0.0)
steps = launch.launches(query, key, key, *structure, 0.125, plan, out)
parts = steps[1].arguments[:2]
for name, grid, *arguments in (
    ("attend_kernel", f"{5 * 2 // 16 + 2},1,3", query, key, key, *structure, 5, 40, 2, *parts),
    ("combine_kernel", "10,1,1", *parts, 10, 3, out),
):
    text = ",".join(str(x) if isinstance(x, int) else f"p{x.data_ptr()}" for x in arguments)
    print(f"launch {name} grid={grid} arguments={text}", flush=True)
shape = launch.shape_of(query, key, key)
ptx_launch.run(steps, ptx_launch.load(shape, plan, aot.artifact_sm(driver.device_sm()), 0.125))
"""


def run(script: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return (done.stdout + done.stderr).splitlines()


@pytest.fixture(scope="module")
def recording_driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a driver records launches, on a GPU of SM 89."""
    if not os.environ.get("CI") and importlib.util.find_spec("cuda") is None:
        pytest.skip("the launcher needs the driver's bindings: pip install cuda-bindings")
    triton = pytest.importorskip("triton", reason="for cuda.h: pip install triton")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).parent / "cpp" / "recording_driver.cc"
    library = ["-shared", "-fPIC", "-std=c++17", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(["g++", *library, f"-I{headers}", str(source), "-ldl"], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "RECORDING_SM": "89"}


def test_the_operators_launches_become_those_of_its_artifacts(recording_driver: dict[str, str]) -> None:
    *expected, attend, combine = run(OPERATOR, recording_driver)
    assert [re.sub(r" block=\S+ shared=\S+", "", line) for line in (attend, combine)] == expected


def test_launch_reaches_the_driver_as_it_was_given(recording_driver: dict[str, str]) -> None:
    assert run(SCRIPT, recording_driver) == [
        "sm 89",
        "launch k grid=5,6,7 block=128,1,1 shared=60000 arguments=p16,p32,-3,p48",
        "BuildError the NVIDIA driver answered CUDA_ERROR_INVALID_PTX",
    ]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a driver")
def test_machine_without_a_driver_says_so() -> None:
    with pytest.raises(BuildError, match=r"no NVIDIA driver on this machine|pip install cuda-bindings"):
        driver.device_sm()
