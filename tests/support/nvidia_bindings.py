"""NVIDIA's real TensorRT bindings on a machine without a GPU and without TensorRT.

The Python bindings and the lean runtime are ordinary wheels; the three full libraries they link are not. `load` builds
stand-ins for those three: what a plugin needs (its registry, its validators) is the lean runtime's real code, and what
builds or parses a network answers null. With the full TensorRT installed nothing is built and the real libraries serve.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

# Without dependencies: what `tensorrt-cu13` asks for are the full libraries, which it would download from elsewhere.
INSTALL = "pip install --no-deps tensorrt-cu13 tensorrt-cu13-bindings tensorrt-lean-cu13-libs"

# soname -> functions that the bindings import from it and that the lean runtime does not have; each returns null.
_STAND_INS = {
    "libnvinfer.so": ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "getBuilderPluginRegistry"),
    "libnvonnxparser.so": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so": ("initLibNvInferPlugins",),
}


def missing() -> str | None:
    """Why the bindings cannot be had here, with the command that changes it; None when they can."""
    if importlib.util.find_spec("tensorrt_libs") is not None:
        return None
    for package in ("tensorrt", "tensorrt_bindings", "tensorrt_lean_libs"):
        if importlib.util.find_spec(package) is None:
            return f"NVIDIA's bindings are not installed (no {package}): {INSTALL}"
    if shutil.which("g++") is None:
        return "the stand-in libraries need g++: apt-get install g++"
    return None


def load_or_skip() -> ModuleType:
    """`load` for a test module: skips it where the bindings are missing, but never in CI, which has them."""
    reason = missing()
    if reason and not os.environ.get("CI"):
        pytest.skip(reason, allow_module_level=True)
    return load()


@functools.cache
def load() -> ModuleType:
    """The module `tensorrt`, with `tensorrt.plugin` imported, in this process.

    Raises:
        ImportError: with the reason `missing` gives.
    """
    if reason := missing():
        raise ImportError(reason)
    if importlib.util.find_spec("tensorrt_libs") is None:
        _load_stand_ins()
    tensorrt = importlib.import_module("tensorrt")
    importlib.import_module("tensorrt.plugin")
    return tensorrt


def _load_stand_ins() -> None:
    """Build the three libraries, and load them so that the bindings' own loader finds them by soname."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None
    assert spec.origin is not None
    lean = next(Path(spec.origin).parent.glob("libnvinfer_lean.so.*"))
    major = lean.suffix
    ctypes.CDLL(str(lean))
    with tempfile.TemporaryDirectory(prefix="stca-tensorrt-") as folder:
        for name, functions in _STAND_INS.items():
            soname = f"{name}{major}"
            source = Path(folder, f"{name}.cpp")
            source.write_text(
                "".join(f'extern "C" void* {function}() {{ return nullptr; }}\n' for function in functions)
            )
            command = ["g++", "-shared", "-fPIC", str(source), f"-Wl,-soname,{soname}", "-o", str(Path(folder, soname))]
            if name == "libnvinfer.so":  # what is not listed above comes from the lean runtime
                command += ["-Wl,--no-as-needed", f"-L{lean.parent}", f"-l:{lean.name}"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            ctypes.CDLL(str(Path(folder, soname)))  # stays loaded when the file goes
