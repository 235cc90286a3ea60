"""Which of a bundle's engines to serve with on this machine, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stca.backends import BACKENDS
from stca.bundle import Bundle
from stca.errors import BuildError
from stca.manifest import EngineEntry, Manifest
from stca.runtime.backend import Machine, server_of
from stca.runtime.engine import Engine, OnnxRuntimeEngine
from stca.runtime.options import OnnxRuntimeOptions
from stca.specs import HALVES

__all__ = ["Choice", "Machine", "best_engine", "open_engines", "own_graphs"]


@dataclass(frozen=True)
class Choice:
    """Engines of both halves.

    Attributes:
        flavour, precision: of both; a user state has the precision's type, so the two always match.
        entries: by half, the manifest's entry; empty means ONNX Runtime's CPU provider on the bundle's own graphs.
        why: one line.
        passed_over: one line for each faster pair that cannot run here.
    """

    flavour: str
    precision: str
    entries: Mapping[str, EngineEntry]
    why: str
    passed_over: tuple[str, ...] = ()

    def told(self) -> dict[str, str]:
        """The `precision`, `why` these engines, and why no others."""
        return {"precision": self.precision, "why": self.why, "passed_over": "; ".join(self.passed_over)}


def best_engine(
    manifest: Manifest,
    machine: Machine | None = None,
    *,
    only: str | None = None,
    precision: str | None = None,
    gpu: int = 0,
    native_code: bool = False,
) -> Choice:
    """The fastest pair of engines that can run here; ONNX Runtime on the CPU always can.

    Args:
        manifest: of a loaded bundle, whose engines' digests have been checked.
        machine: where to run; None looks at this one, with the GPU of number `gpu`.
        only: the flavour to take, whose engines must then run here.
        precision: of the engines, where a flavour is asked for; None takes the fastest.
        native_code: take engines that carry native code: opening one runs it.

    Raises:
        BuildError: when a flavour is asked for and it has no such engines that run here.
    """
    if only is not None:
        server_of(only)
    machine = machine or Machine.here(gpu)
    passed_over: list[str] = []
    for flavour in [only] if only else BACKENDS:
        server = server_of(flavour)
        kinds = [(provider, kind) for provider, precisions in server.ranks for kind in precisions]
        for provider, kind in kinds:
            if precision not in (None, kind):
                continue
            for sm, entries in _pairs(manifest, flavour, provider, kind, machine):
                name = f"{flavour} {kind}" + (f" for SM {sm}" if sm else "")
                missing = [f"there is no engine of {half}; run `stca build`" for half in HALVES if half not in entries]
                reason = next(iter(missing), None) or server.obstacle(entries, machine)
                if reason is None and not native_code and any(e.carries_code for e in entries.values()):
                    reason = "it carries native code, which opening it runs; say native_code if you trust its maker"
                if reason is None and only is None:
                    reason = server.slow(provider, kind)
                if reason is None:
                    why = f"{name} is the fastest pair in the bundle that runs here"
                    return Choice(flavour, kind, entries, why, tuple(passed_over))
                passed_over.append(f"{name}: {reason}")
    if only is not None:
        asked = only if precision is None else f"{only} {precision}"
        command = f"stca build --engine {only}" + (f" --precision {precision}" if precision else "")
        reasons = "; ".join(passed_over) or f"the bundle has none; run `{command}`"
        raise BuildError(f"no {asked} engines that run here: {reasons}")
    why = "ONNX Runtime on the CPU runs the bundle's own graphs; it has no faster engine that runs here"
    return own_graphs(why, tuple(passed_over))


def own_graphs(why: str = "the bundle's own graphs were asked for", passed_over: tuple[str, ...] = ()) -> Choice:
    """The bundle's own graphs on ONNX Runtime's CPU provider, whatever engines it has."""
    return Choice("onnxruntime", "fp32", {}, why, passed_over)


def _pairs(
    manifest: Manifest, flavour: str, provider: str, precision: str, machine: Machine
) -> list[tuple[int | None, dict[str, EngineEntry]]]:
    """Engines that serve together, by the GPU they are for; this machine's first."""
    pairs: dict[int | None, dict[str, EngineEntry]] = {}
    for e in manifest.engines:
        if (e.flavour, e.precision, e.provider or "") == (flavour, precision, provider):
            pairs.setdefault(e.sm, {})[e.graph] = e
    return sorted(pairs.items(), key=lambda pair: pair[0] != machine.sm)


def open_engines(
    bundle: Bundle,
    choice: Choice,
    *,
    threads: int | None = None,
    onnxruntime: OnnxRuntimeOptions | None = None,
    gpu: int = 0,
) -> dict[str, Engine]:
    """Load the chosen engine of each half, by half.

    Args:
        bundle: a loaded one: its files, plans among them, have been held against the manifest.
        choice: from `best_engine`, or the entries of one's own choosing.
        threads: of ONNX Runtime; see `OnnxRuntimeEngine`.
        onnxruntime: how it runs the bundle's own graphs; None for its CPU provider.
        gpu: number of the GPU for TensorRT's engines.

    Raises:
        BuildError: when an engine cannot be loaded here.
    """
    engines: dict[str, Engine] = {}
    for half in HALVES:
        entry = choice.entries.get(half)
        if entry is None:
            engines[half] = open_own(bundle, half, threads=threads, onnxruntime=onnxruntime)
        else:
            engines[half] = server_of(choice.flavour).open(bundle, half, entry, threads=threads, gpu=gpu)
    return engines


def open_own(
    bundle: Bundle, graph: str, *, threads: int | None = None, onnxruntime: OnnxRuntimeOptions | None = None
) -> Engine:
    """One of the bundle's own graphs on ONNX Runtime; arguments as of `open_engines`.

    Raises:
        BuildError: when it cannot be loaded here.
    """
    own = onnxruntime or OnnxRuntimeOptions()
    return OnnxRuntimeEngine(bundle.file(graph), threads=threads, providers=own.providers, config=own.config)
