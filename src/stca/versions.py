"""Which versions take part: figures belong to the packages that made them."""

from __future__ import annotations

import importlib.metadata
import platform

import stca

# What can change a score or a time; in the order they are listed.
PACKAGES = ("onnxruntime", "torch", "onnx", "numpy", "tensorrt", "tensorrt-rtx-cu13-bindings")


def installed() -> dict[str, str]:
    """Versions of stca, Python and those of `PACKAGES` that are installed; nothing is imported for it."""
    found = {"stca": stca.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
