"""Checkpoint → torch module → one ONNX request graph → split by dataflow → bundle.

The names below are what an exporter needs. They load torch when they are first used: a part of this package, the
graph's scopes and costs, serves programs that need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stca.export.reference.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from stca.export.reference.config import Field, StcaConfig
    from stca.export.to_onnx import RequestModel
    from stca.specs import TensorSpec

_HOMES = {
    "Checkpoint": "stca.export.reference.checkpoint",
    "Field": "stca.export.reference.config",
    "RequestModel": "stca.export.to_onnx",
    "StcaConfig": "stca.export.reference.config",
    "TensorSpec": "stca.specs",
    "load_checkpoint": "stca.export.reference.checkpoint",
    "save_checkpoint": "stca.export.reference.checkpoint",
}

__all__ = [
    "Checkpoint",
    "Field",
    "RequestModel",
    "StcaConfig",
    "TensorSpec",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
