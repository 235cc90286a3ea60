"""Checkpoint → torch module → one ONNX request graph → split by dataflow → bundle."""

from stca.bundle import TensorSpec
from stca.export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from stca.export.config import Field, StcaConfig
from stca.export.to_onnx import RequestModel

__all__ = [
    "Checkpoint",
    "Field",
    "RequestModel",
    "StcaConfig",
    "TensorSpec",
    "load_checkpoint",
    "save_checkpoint",
]
