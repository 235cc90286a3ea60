"""ONNX Runtime as a backend: any provider it has, and its CPU provider everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnxruntime

from stca.bundle import Bundle
from stca.manifest import EngineEntry
from stca.runtime.backend import Machine
from stca.runtime.engine import Engine, OnnxRuntimeEngine


class OnnxRuntimeServer:
    """See `stca.runtime.backend.Server`."""

    name = "onnxruntime"
    # On a CPU float16 is computed in float32 with casts around every operator.
    ranks = (("CUDAExecutionProvider", ("fp16", "bf16", "fp32")), ("CPUExecutionProvider", ("fp32", "fp16")))

    def version(self) -> str:
        return str(onnxruntime.__version__)

    def obstacle(self, entries: Mapping[str, EngineEntry], machine: Machine) -> str | None:
        missing = [e.provider for e in entries.values() if e.provider not in machine.providers]
        return f"ONNX Runtime has no {missing[0]} here" if missing else None

    def slow(self, provider: str, precision: str) -> str | None:
        if provider == "CPUExecutionProvider" and precision != "fp32":
            return "on a CPU the bundle's own float32 graphs are faster"
        return None

    def open(self, bundle: Bundle, half: str, entry: EngineEntry, *, threads: int | None, gpu: int) -> Engine:
        providers = (entry.provider or "CPUExecutionProvider",)
        return OnnxRuntimeEngine(bundle.path / entry.file, threads=threads, providers=providers)


BACKEND: Final = OnnxRuntimeServer()
