"""TensorRT and TensorRT-RTX as backends: plans for one GPU and one version of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from stca.bundle import Bundle
from stca.manifest import EngineEntry
from stca.runtime.backend import Machine
from stca.runtime.engine import Engine
from stca.specs import TOKENS
from stca.tensorrt_flavours import FLAVOURS, Flavour, installed_version


@dataclass(frozen=True)
class TensorRTServer:
    """See `stca.runtime.backend.Server`."""

    name: str
    ranks: tuple[tuple[str, tuple[str, ...]], ...] = (("", ("bf16", "fp16", "fp32")),)

    @property
    def flavour(self) -> Flavour:
        return FLAVOURS[self.name]

    def version(self) -> str:
        return installed_version(self.flavour)

    def obstacle(self, entries: Mapping[str, EngineEntry], machine: Machine) -> str | None:
        if machine.sm is None:
            return "there is no GPU here"
        if any(e.sm != machine.sm for e in entries.values()):
            return f"this GPU is SM {machine.sm}"
        if self.name not in machine.versions:
            return f"{self.name} is not installed: {self.flavour.install}"
        wrong = {e.version for e in entries.values()} - {machine.versions[self.name]}
        return f"built with {min(wrong)}, here is {machine.versions[self.name]}" if wrong else None

    def slow(self, provider: str, precision: str) -> str | None:
        return None

    def open(self, bundle: Bundle, half: str, entry: EngineEntry, *, threads: int | None, gpu: int) -> Engine:
        from stca.runtime.cuda_device import shared_device
        from stca.runtime.tensorrt_engine import TensorRTEngine

        keep = [s.name for s in bundle.manifest.state if s.shape[:1] == (TOKENS,)]
        return TensorRTEngine(bundle.path / entry.file, entry, shared_device(gpu), keep=keep)


TENSORRT: Final = TensorRTServer("tensorrt")
TENSORRT_RTX: Final = TensorRTServer("tensorrt-rtx")
