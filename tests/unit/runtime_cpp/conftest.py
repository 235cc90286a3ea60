"""The C++ runtime, built once for all its tests."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime
import pytest
from building import FLAGS, REPOSITORY, SANITIZERS, command, configure


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and its tests, with AddressSanitizer and UBSan; STCA_CPP_BUILD may name a folder to keep them in."""
    folder = Path(os.environ.get("STCA_CPP_BUILD") or tmp_path_factory.mktemp("cpp") / "build")
    settings = [
        f"-DCMAKE_CXX_FLAGS={FLAGS}",
        f"-DSTCA_SANITIZE={SANITIZERS}",
        "-DSTCA_BUILD_TESTS=ON",
        "-DSTCA_WERROR=ON",
        "-DCMAKE_UNITY_BUILD=ON",  # half the work; other tests build the library file by file, as users do
    ]
    for name in ("TENSORRT_INCLUDE_DIR", "ONNXRUNTIME_INCLUDE_DIR"):  # NVIDIA's and Microsoft's, which no wheel carries
        if os.environ.get(name):
            settings.append(f"-DSTCA_{name}={os.environ[name]}")
    configure(REPOSITORY / "runtime" / "cpp", folder, *settings)
    command("cmake", "--build", folder, "--parallel", "2")
    return folder


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """ONNX Runtime's shared library, from the Python package."""
    found = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not found:
        pytest.skip("the onnxruntime package has no libonnxruntime.so of its own")
    return found[0]


@pytest.fixture(scope="session")
def installed(build: Path) -> Path:
    prefix = build.parent / "installed"
    command("cmake", "--install", build, "--prefix", prefix)
    return prefix
