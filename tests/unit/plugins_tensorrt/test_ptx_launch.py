"""The launcher, up to the driver: on a CPU a recording driver takes the driver's place, and no kernel runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stca.errors import BuildError
from stca.plugins import aot, ptx_launch

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
from stca.plugins import aot, ptx_launch
ptx = ".visible .entry k(\\n.param .u64 a,\\n.param .u64 b,\\n.param .u32 c,\\n.param .u64 d\\n)\\n{}"
artifact = aot.Artifact("k", ptx, "sm_90a", 128, 60000, ("u64", "u64", "u32", "u64"))
print("sm", ptx_launch.device_sm())
ptx_launch.LoadedKernel(artifact).launch((5, 6, 7), [16, 32], [-3], [48], stream=0)
try:
    ptx_launch.LoadedKernel(aot.Artifact("k", "text", "sm_90a", 128, 0, ()))
except Exception as error:
    print(type(error).__name__, error)
"""


def run(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(
    not os.environ.get("CI") and importlib.util.find_spec("cuda") is None,
    reason="the launcher needs the driver's bindings: pip install cuda-bindings",
)
def test_launch_reaches_the_driver_as_it_was_given(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="for cuda.h: pip install triton")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).parent / "cpp" / "recording_driver.cc"
    library = ["-shared", "-fPIC", "-std=c++17", "-Wl,-soname,libcuda.so.1", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(["g++", *library, f"-I{headers}", str(source), "-ldl"], check=True)
    said = run({"LD_LIBRARY_PATH": str(tmp_path), "RECORDING_SM": "89"}).splitlines()
    assert said == [
        "sm 89",
        "launch k grid=5,6,7 block=128,1,1 shared=60000 arguments=p16,p32,-3,p48",
        "BuildError the NVIDIA driver answered CUDA_ERROR_INVALID_PTX",
    ]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a driver")
def test_machine_without_a_driver_says_so() -> None:
    with pytest.raises(BuildError, match=r"no NVIDIA driver on this machine|pip install cuda-bindings"):
        ptx_launch.device_sm()
