"""Which of a bundle's engines to serve with on this machine, and why not the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stca.bundle import HALVES, TOKENS, Bundle, Manifest
from stca.errors import BuildError
from stca.runtime.engine import Engine, OnnxRuntimeEngine
from stca.tensorrt_flavours import FLAVOURS, installed_version

# Fastest first. On a CPU float16 is computed in float32 with casts around every operator.
_ORDER: Final = (
    ("tensorrt", "", ("bf16", "fp16", "fp32")),
    ("tensorrt-rtx", "", ("bf16", "fp16", "fp32")),
    ("onnxruntime", "CUDAExecutionProvider", ("fp16", "bf16", "fp32")),
    ("onnxruntime", "CPUExecutionProvider", ("fp32", "fp16")),
)


@dataclass(frozen=True)
class Machine:
    """What can run here.

    Attributes:
        sm: compute capability of the first GPU, 90 for 9.0; None without one.
        versions: of the TensorRT flavours that are installed.
        providers: of ONNX Runtime.
    """

    sm: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    providers: Sequence[str] = ("CPUExecutionProvider",)

    @classmethod
    def here(cls) -> Machine:
        """This machine, without loading a TensorRT."""
        import onnxruntime

        from stca.plugins.ptx_launch import device_sm

        sm, versions = None, {}
        if importlib.util.find_spec("cuda") is not None:
            try:
                sm = device_sm()
            except BuildError:
                sm = None
        for name, flavour in FLAVOURS.items():
            try:
                versions[name] = installed_version(flavour)
            except BuildError:
                continue
        return cls(sm, versions, tuple(onnxruntime.get_available_providers()))


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
    entries: Mapping[str, Mapping[str, Any]]
    why: str
    passed_over: tuple[str, ...] = ()


def best_engine(
    manifest: Manifest, machine: Machine | None = None, *, only: str | None = None, precision: str | None = None
) -> Choice:
    """The fastest pair of engines that can run here; ONNX Runtime on the CPU always can.

    Args:
        manifest: of a loaded bundle, whose engines' digests have been checked.
        machine: where to run; None looks at this one.
        only: the flavour to take, whose engines must then run here.
        precision: of the engines, where a flavour is asked for; None takes the fastest.

    Raises:
        BuildError: when a flavour is asked for and it has no such engines that run here.
    """
    if only is not None and only not in (known := list(dict.fromkeys(flavour for flavour, _, _ in _ORDER))):
        raise BuildError(f"there is no engine {only!r}; choose {', '.join(known)}")
    machine = machine or Machine.here()
    passed_over: list[str] = []
    for flavour, provider, precisions in _ORDER:
        if only not in (None, flavour):
            continue
        for kind in precisions:
            if precision not in (None, kind):
                continue
            pairs: dict[Any, dict[str, Mapping[str, Any]]] = {}
            for e in manifest.engines:
                if (e["flavour"], e["precision"], e.get("provider", "")) == (flavour, kind, provider):
                    pairs.setdefault(e["sm"], {})[e["graph"]] = e
            for sm, entries in sorted(pairs.items(), key=lambda pair: pair[0] != machine.sm):
                name = f"{flavour} {kind}" + (f" for SM {sm}" if sm else "")
                if reason := _obstacle(entries, flavour, provider, sm, machine):
                    passed_over.append(f"{name}: {reason}")
                    continue
                if only is None and provider == "CPUExecutionProvider" and kind != "fp32":
                    passed_over.append(f"{name}: on a CPU the bundle's own float32 graphs are faster")
                    continue
                why = f"{name} is the fastest pair in the bundle that runs here"
                return Choice(flavour, kind, entries, why, tuple(passed_over))
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


def open_engines(bundle: Bundle, choice: Choice, *, threads: int | None = None) -> dict[str, Engine]:
    """Load the chosen engine of each half, by half.

    Args:
        bundle: a loaded one: its files, plans among them, have been held against the manifest.
        choice: from `best_engine`, or the entries of one's own choosing.
        threads: of ONNX Runtime; see `OnnxRuntimeEngine`.

    Raises:
        BuildError: when an engine cannot be loaded here.
    """
    engines: dict[str, Engine] = {}
    device = None
    for half in HALVES:
        entry = choice.entries.get(half)
        if entry is None:
            engines[half] = OnnxRuntimeEngine(bundle.file(half), threads=threads)
        elif choice.flavour == "onnxruntime":
            engines[half] = OnnxRuntimeEngine(
                bundle.path / entry["file"], threads=threads, providers=(entry["provider"],)
            )
        else:
            from stca.runtime.cuda_device import shared_device
            from stca.runtime.tensorrt_engine import TensorRTEngine

            device = device or shared_device()
            tokens = [s.name for s in bundle.manifest.state if s.shape[:1] == (TOKENS,)]
            keep = tokens if half == "user_encoder" else ()
            engines[half] = TensorRTEngine(bundle.path / entry["file"], entry, device, keep=keep)
    return engines


def _obstacle(
    entries: Mapping[str, Mapping[str, Any]], flavour: str, provider: str, sm: int | None, machine: Machine
) -> str | None:
    """Why a pair cannot run; None when it can."""
    if missing := [half for half in HALVES if half not in entries]:
        return f"there is no engine of {missing[0]}; run `stca build`"
    if flavour == "onnxruntime":
        return None if provider in machine.providers else f"ONNX Runtime has no {provider} here"
    if machine.sm is None:
        return "there is no GPU here"
    if machine.sm != sm:
        return f"this GPU is SM {machine.sm}"
    if flavour not in machine.versions:
        return f"{flavour} is not installed: {FLAVOURS[flavour].install}"
    wrong = {e["version"] for e in entries.values()} - {machine.versions[flavour]}
    return f"built with {sorted(wrong)[0]}, here is {machine.versions[flavour]}" if wrong else None
