"""The C++ plugin library for one engine: kernels for its shapes compiled, embedded, and linked with CMake.

Needs a C++ compiler, CMake, `ptxas`, Triton, and headers of CUDA and TensorRT; no GPU, no toolkit and no TensorRT.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stca.errors import BuildError
from stca.plugins import artifacts, tiling
from stca.plugins.aot import artifact_sm
from stca.plugins.tiling import Shape

SOURCES: Final = Path(__file__).parent / "cpp"
_SYSTEM: Final = ("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu")


def tensorrt_headers() -> str:
    """The folder of `NvInferRuntime.h`: named in TENSORRT_INCLUDE_DIR, the system's, or a package's.

    Raises:
        BuildError: when there is none, with what to install.
    """
    places = (os.environ.get("TENSORRT_INCLUDE_DIR", ""), *_SYSTEM, _in_package("kernel_lens", "include/tensorrt"))
    return _holding(
        "NvInferRuntime.h",
        places,
        "TensorRT's headers are not here: install TensorRT's, or pip install --no-deps kernel-lens, or name their "
        "folder in TENSORRT_INCLUDE_DIR",
    )


def cuda_headers() -> str:
    """The folder of `cuda.h`: the toolkit's, or the one that comes with Triton.

    Raises:
        BuildError: when there is none, with what to install.
    """
    toolkit = (str(Path(home, "include")) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home)
    places = (*toolkit, _in_package("triton", "backends/nvidia/include"))
    return _holding("cuda.h", places, "cuda.h is not here: install the CUDA toolkit, or pip install triton")


def _in_package(name: str, folder: str) -> str:
    """A folder of an installed package, which is not imported for it."""
    spec = importlib.util.find_spec(name)
    return str(Path(spec.origin).parent / folder) if spec and spec.origin else ""


def _holding(header: str, places: Sequence[str], todo: str) -> str:
    for place in places:
        if place and Path(place, header).exists():
            return place
    raise BuildError(todo)


def build(shapes: Sequence[tuple[Shape, float]], sms: Sequence[int], folder: Path) -> Path:
    """Build the library with kernels for these shapes, each with its scale, and these SMs.

    Args:
        shapes: what the engine's attentions have; `stca.plugins.tensorrt_graph.operators` tells.
        sms: compute capabilities of the GPUs that will run it; one without kernels of its own gets the portable ones.
        folder: for what is made on the way; the library stays there.

    Returns:
        `libstca_tensorrt.so`.

    Raises:
        BuildError: when a header or a tool is missing, or a kernel or a source does not compile.
    """
    include = {"TENSORRT_INCLUDE_DIR": tensorrt_headers(), "CUDA_INCLUDE_DIR": cuda_headers()}
    if shutil.which("cmake") is None:
        raise BuildError("the C++ plugin is built with CMake, which is not here: apt-get install cmake g++")
    kernels = list(artifacts.build(shapes, [artifact_sm(sm) for sm in sms], tiling.PORTABLE_SHARED_LIMIT))
    artifacts.write(kernels, folder / "kernels")
    options = [f"-D{name}={value}" for name, value in {**include, "STCA_ARTIFACTS": folder / "kernels"}.items()]
    for command in (
        ["cmake", "-S", str(SOURCES), "-B", str(folder / "library"), *options],
        ["cmake", "--build", str(folder / "library"), "--parallel"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise BuildError(f"the C++ plugin cannot be built: {said}")
    return folder / "library" / "libstca_tensorrt.so"
