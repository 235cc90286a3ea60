"""What a server needs of a library that runs engines: whether it can here, and an engine of a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from stca.backends import BACKENDS
from stca.bundle import Bundle
from stca.errors import BuildError
from stca.manifest import EngineEntry
from stca.runtime.engine import Engine


@dataclass(frozen=True)
class Machine:
    """What can run here.

    Attributes:
        sm: compute capability of the GPU that is looked at, 90 for 9.0; None without one.
        versions: of the backends that are installed, by name.
        providers: of ONNX Runtime.
    """

    sm: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    providers: Sequence[str] = ("CPUExecutionProvider",)

    @classmethod
    def here(cls, gpu: int = 0) -> Machine:
        """This machine with the GPU of that number, without loading a TensorRT."""
        import onnxruntime

        from stca.plugins.driver import device_sm

        sm, versions = None, {}
        if importlib.util.find_spec("cuda") is not None:
            try:
                sm = device_sm(gpu)
            except BuildError:
                sm = None
        for name in BACKENDS:
            try:
                versions[name] = server_of(name).version()
            except BuildError:
                continue
        return cls(sm, versions, tuple(onnxruntime.get_available_providers()))


class Server(Protocol):
    """One backend's side that serves; it imports nothing of what builds."""

    @property
    def name(self) -> str:
        """As in `stca.backends.BACKENDS`."""

    @property
    def ranks(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Execution providers, empty where there are none, each with its precisions; fastest first."""

    def version(self) -> str:
        """Of the installed library, without loading it. Raises BuildError, which says how to install it."""

    def obstacle(self, entries: Mapping[str, EngineEntry], machine: Machine) -> str | None:
        """Why the engines of a bundle's two halves cannot run on a machine; None when they can."""

    def slow(self, provider: str, precision: str) -> str | None:
        """Why such engines are taken only when they are asked for; None when they may be faster."""

    def open(self, bundle: Bundle, half: str, entry: EngineEntry, *, threads: int | None, gpu: int) -> Engine:
        """The engine of a half, on the GPU of that number. Raises BuildError when it cannot be loaded here."""


def server_of(name: str) -> Server:
    """A backend's side that serves.

    Raises:
        BuildError: naming those there are.
    """
    if name not in BACKENDS:
        raise BuildError(f"there is no engine {name!r:.60}; choose {', '.join((*BACKENDS, 'graphs'))}")
    return cast(Server, BACKENDS[name].server())
