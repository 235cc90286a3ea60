"""TensorRT and TensorRT-RTX: one builder, whose module is chosen at import, and one table of what differs.

Building happens in a process of its own (`stca.engines.tensorrt_builder`): a parser of NVIDIA's may abort, and that
must be an error message to the caller and not the caller's end. Only that process loads a TensorRT.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from stca.arrays import Progress
from stca.bundle import scratch
from stca.errors import BuildError

RefitMode = Literal["none", "identical", "weights"]
# Smallest, best and largest size of each symbolic dimension, by its name.
Profile = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Flavour:
    """What differs between the two.

    Attributes:
        name: in manifests and on the command line.
        modules: import names, the first that is there is taken.
        distributions: packages that carry the version, for a cache key without importing anything.
        install: how to get it.
        lowerings: how the operator may reach it, the preferred way first; `stca.export.engine_graph` has the words.
        ahead_of_time: builds for any SM it knows, GPU or not; the other one builds for the GPU it runs on.
        timing_cache: whether it measures kernels while it builds, and can remember.
        refit: default refit mode.
        graphs: who makes CUDA graphs at run time: we, by capturing, or the library itself.
    """

    name: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    install: str
    lowerings: tuple[str, ...]
    ahead_of_time: bool
    timing_cache: bool
    refit: RefitMode
    graphs: Literal["captured", "native"]


FLAVOURS: Final[Mapping[str, Flavour]] = {
    "tensorrt": Flavour(
        name="tensorrt",
        modules=("tensorrt",),
        distributions=("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt"),
        install="install NVIDIA's TensorRT with its libraries (pip install tensorrt-cu13, from NVIDIA's own index)",
        lowerings=("quick", "plugin", "fused", "decomposed"),
        ahead_of_time=False,
        timing_cache=True,
        refit="identical",
        graphs="captured",
    ),
    "tensorrt-rtx": Flavour(
        name="tensorrt-rtx",
        modules=("tensorrt_rtx_bindings", "tensorrt_rtx"),
        distributions=("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"),
        install="pip install 'stca[tensorrt-rtx]'",
        lowerings=("fused", "decomposed", "plugin"),
        ahead_of_time=True,
        timing_cache=False,
        refit="none",  # its refit modes compile for the GPU of this machine, and fail where there is none
        graphs="native",  # it compiles kernels for a shape while it runs, so a capture from outside may come too early
    ),
}


PROGRESS: Final = "stca-progress "  # begins a line that the building process wants passed on
_PLUGIN: Final = "stca::"  # begins a line of our plugin library, which has no other way out than stderr


@dataclass(frozen=True)
class Job:
    """One plan to build or, with `refit_from`, to make of another plan with the graph's present weights.

    Without `plan` nothing is built: the answer is whether the library builds for this SM.
    """

    flavour: str
    graph: str
    state: Sequence[str]
    precision: str
    lowering: str
    profiles: Sequence[Profile]
    sm: int | None
    refit: str
    requests: int
    plan: str | None
    timing_cache: str | None = None
    refit_from: str | None = None
    folder: str = ""  # for what is made on the way; `build_plan` gives one


@dataclass(frozen=True)
class Built:
    """What came of a job.

    Attributes:
        version: of the library that built it.
        sm: what it was built for.
        seconds: of parsing and building, without the start of the process.
        layers: of the network by type, before TensorRT fuses them.
        fused_layers: what the library's inspector tells of the engine's or, where it cannot load the engine here, what
            its builder logged; None where that is nothing.
        attention_nodes: how many attentions are in the engine.
        memory: bytes at the largest sizes; see `stca.export.engine_graph.estimate_memory`, and `scratch`, what the
            library says that a run takes besides, where it can load the engine.
        inputs, outputs: `(name, dtype, shape)`; a string is a size that varies.
    """

    version: str
    sm: int
    seconds: float = 0.0
    layers: Mapping[str, int] = field(default_factory=dict)
    fused_layers: Sequence[Any] | None = None
    attention_nodes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    inputs: Sequence[Sequence[Any]] = ()
    outputs: Sequence[Sequence[Any]] = ()


def installed_version(flavour: Flavour) -> str:
    """Version of the installed library, without loading it.

    Raises:
        BuildError: when it is not installed.
    """
    if not any(importlib.util.find_spec(module) for module in flavour.modules):
        raise BuildError(f"{flavour.name} is not installed: {flavour.install}")
    for name in flavour.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def load(flavour: Flavour) -> Any:
    """The library's module.

    Raises:
        BuildError: when it is missing or cannot be loaded.
    """
    name = next((name for name in flavour.modules if importlib.util.find_spec(name)), flavour.modules[0])
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise BuildError(f"{flavour.name} cannot be loaded ({e}): {flavour.install}") from e


def largest_sizes(profiles: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, int]:
    """How large each dimension gets over an engine's profiles; one that no profile has is not bounded."""
    return {dim: max(p[dim][2] for p in profiles if dim in p) for profile in profiles for dim in profile}


def runtime_for(trt: Any, log: Any, lowering: str | None) -> Any:
    """What loads a plan; code of ours that lies in it may run where the manifest says that there is some."""
    runtime = trt.Runtime(log)
    if lowering == "plugin":
        runtime.engine_host_code_allowed = True
    return runtime


def look_into(trt: Any, engine: Any) -> dict[str, Any]:
    """What the library tells of a loaded engine: `layers`, after fusion, and `device_memory` in bytes."""
    told = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return {"layers": told["Layers"], "device_memory": int(engine.device_memory_size_v2)}


def _environment(folder: Path) -> dict[str, str]:
    """The building process's: TensorRT-RTX opens its own library by a name without version, which its wheel lacks."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    found = sorted(Path(str(spec.origin)).parent.glob("libtensorrt_rtx.so.*")) if spec else []
    if found:  # of a library and its shorter names, which are links to it, any will do
        (folder / "libtensorrt_rtx.so").symlink_to(found[0])  # the same file, so it is not loaded twice
    path = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path)}


def build_plan(job: Job, progress: Progress) -> Built:
    """Build one plan in a process of its own, into `job.plan`.

    Raises:
        BuildError: what the library said, or how its process died.
    """
    with scratch("stca-build") as folder:
        request, reply = folder / "job.json", folder / "reply.json"
        request.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, folder=str(folder)))))
        # -P: `-m` alone would import from the working directory first, which may be a bundle's.
        command = [sys.executable, "-P", "-m", "stca.engines.tensorrt_builder", str(request), str(reply)]
        tail: collections.deque[str] = collections.deque(maxlen=20)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(folder),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(PROGRESS):
                    progress(line.removeprefix(PROGRESS).strip())
                elif line.strip():
                    tail.append(line.strip())
        if reply.exists():
            answer = json.loads(reply.read_text())
            if "error" in answer:
                ours = [line for line in tail if line.startswith(_PLUGIN)]  # TensorRT tells only that a plugin failed
                raise BuildError(f"{answer['error']}; {ours[-1]}" if ours else answer["error"])
            return Built(**answer)
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    said = tail[-1][:300] if tail else "nothing"
    raise BuildError(f"{job.flavour} died while building {Path(job.graph).name} ({how}); its last words: {said}")
