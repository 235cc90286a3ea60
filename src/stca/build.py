"""Engines from a bundle: both halves, typed, lowered where they must be, built once, and written into the bundle.

A build never changes numbers in silence. The lowered graphs are run against the bundle's own before an engine is made
of them; an engine without its fused attention is an error; and the manifest says of each engine what it can serve.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stca.bundle import HALVES, MANIFEST, WEIGHTS, Bundle, BundleChangedError, Manifest, sha256_of, writing
from stca.engine_cache import EngineCache, key_of, why_missed
from stca.errors import BuildError
from stca.tensorrt_flavours import FLAVOURS, Job, Profile, RefitMode, build_plan, installed_version, largest_sizes
from stca.types import Progress

if TYPE_CHECKING:
    from stca.export.engine_graph import Attention
    from stca.export.precision import Precision

ENGINES: Final = ("onnxruntime", *FLAVOURS)


@dataclass(frozen=True)
class Workload:
    """The sizes engines are built for.

    Attributes:
        history_max: most history tokens of one run; None takes the bundle's limit, or 10 240.
        targets_max: most targets of one run.
        requests_max: most requests of one run, where the engine can serve more than one.
        history_buckets: upper edges of ranges with an optimization profile of their own, where one for all is slow.
        sizes: largest size of any other symbolic dimension, by name.
    """

    history_max: int | None = None
    targets_max: int = 512
    requests_max: int = 1
    history_buckets: tuple[int, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def profiles(self, dims: Sequence[str], max_history: int | None) -> list[Profile]:
        """One profile per bucket, each best at its upper edge, over the symbolic dimensions `dims`.

        Raises:
            BuildError: when a dimension has no size, or sizes make no sense.
        """
        history = self.history_max or max_history or 10_240
        largest = {"N_h": history, "N_t": self.targets_max, **self.sizes}
        largest |= {"B": self.requests_max, "B_plus_1": self.requests_max + 1}
        if "N_h" in dims and max_history and self.requests_max == 1 and history > max_history:
            raise BuildError(f"the bundle serves histories of at most {max_history} tokens; --history-max is {history}")
        if late := [e for e in self.history_buckets if "N_h" in dims and e >= history]:
            raise BuildError(f"history bucket {late[0]} is not below the largest history, {history}; leave it out")
        if missing := [d for d in dims if d not in largest]:
            raise BuildError(f"dimension {missing[0]!r} has no size; say how large it gets with --size {missing[0]}=N")
        if bad := [d for d in dims if largest[d] < 1]:
            raise BuildError(f"dimension {bad[0]!r} is to be at most {largest[bad[0]]}; it must be at least 1")
        edges = sorted({*(self.history_buckets if "N_h" in dims else ()), history})
        profiles: list[Profile] = []
        for low, high in zip([0, *edges], edges, strict=False):
            fixed = {"N_h": (low + 1, high, high), "B_plus_1": (2, largest["B_plus_1"], largest["B_plus_1"])}
            profiles.append({d: fixed.get(d, (1, largest[d], largest[d])) for d in dims})
        return profiles


@dataclass(frozen=True)
class _Plan:
    """One engine that is wanted: its place in the bundle and everything that goes into it."""

    graph: str
    file: str
    parts: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.parts)


def build(
    bundle: str | os.PathLike[str],
    *,
    engine: str,
    sm: int | None = None,
    precision: Precision = "fp32",
    attention: Attention | None = None,
    workload: Workload | None = None,
    refit: RefitMode | None = None,
    provider: str = "CPUExecutionProvider",
    cache: EngineCache | None = None,
    dry_run: bool = False,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Build engines of both halves and write them into the bundle; what was built before is taken from there.

    Args:
        bundle: its directory. It is replaced in one step at the end, or stays as it was.
        engine: onnxruntime, tensorrt or tensorrt-rtx.
        sm: compute capability to build for, 89 for 8.9; tensorrt takes this machine's GPU when it is None.
        precision: of weights and activations; `stca.export.precision` says what stays float32.
        attention: how the operator gets into the engine; None takes the flavour's own way. float32 has no fused
            attention in TensorRT and is decomposed, which the result says.
        workload: sizes to build for.
        refit: whether new weights can be put into a finished engine; None takes the flavour's default.
        provider: of ONNX Runtime.
        cache: where built engines are kept besides; None keeps none.
        dry_run: build nothing, say what would be built, and how much memory it takes.
        progress: told each step as it starts.

    Returns:
        For each half `graph`, `path`, `bytes`, `seconds`, `precision`, `profiles`, what else the manifest says of the
        engine, and `cache` (`hit` or `miss`) with `why`.

    Raises:
        BuildError, ExportError, BundleError: one line; the bundle is untouched.
    """
    root = Path(bundle)
    manifest = _manifest(root)
    plans = _wanted(manifest, engine, sm, precision, attention, workload or Workload(), refit, provider)
    if attention is None and plans[0].parts["attention"] == "decomposed":
        progress(f"{engine} has no fused attention in {precision}: it is built of MatMul, Softmax and MatMul")
    held = {json.dumps(e.get("key"), sort_keys=True): e for e in manifest.engines}
    known = functools.cache(lambda: list(_known(manifest, cache)))  # read where there is a miss, and once for both
    results: dict[str, dict[str, Any]] = {}
    fresh: dict[str, Path | None] = {}
    misses: list[_Plan] = []
    for plan in plans:
        entry = held.get(json.dumps(plan.parts, sort_keys=True))
        if entry and _is_whole(root, manifest, entry["file"]):
            results[plan.graph] = {**entry, "cache": "hit", "why": "it is in the bundle"}
        elif cache and (found := cache.get(plan.key)):
            results[plan.graph] = {**found[0], "file": plan.file, "cache": "hit", "why": f"it is in {cache.root}"}
            fresh[plan.graph] = found[1]
        else:
            results[plan.graph] = {"cache": "miss", "why": why_missed(plan.parts, known())}
            misses.append(plan)
        progress(f"{plan.graph}: {results[plan.graph]['cache']}, {results[plan.graph]['why']}")
    if dry_run:
        if misses and engine in FLAVOURS and FLAVOURS[engine].ahead_of_time:
            build_plan(job_of(Bundle(root, manifest), misses[0].parts, plan=None), progress)
        return [_forecast(root, manifest, plan, results[plan.graph]) for plan in plans]
    if not misses and not fresh:
        return [_result(root, plan, results[plan.graph]) for plan in plans]
    loaded = Bundle.load(root)
    with tempfile.TemporaryDirectory(prefix="stca-engines-") as folder:
        padded: Mapping[str, list[str]] = {}
        if misses and engine in FLAVOURS:
            from stca.engine_checks import check_graphs

            progress("checking the engines' graphs on ONNX Runtime")
            one = misses[0].parts["requests"] == 1
            padded = check_graphs(loaded, misses[0].parts["attention"], Path(folder), one_request=one)
        for plan in misses:
            progress(f"{plan.graph}: building for {engine} in {precision}")
            entry, file = _build_one(loaded, plan, padded.get(plan.graph, []), Path(folder), cache, progress)
            results[plan.graph] |= entry
            fresh[plan.graph] = file
        progress("writing the bundle")
        _write(loaded, [(results[g], file) for g, file in fresh.items()])
    return [_result(root, plan, results[plan.graph]) for plan in plans]


def _known(manifest: Manifest, cache: EngineCache | None) -> Iterator[Mapping[str, Any]]:
    """What went into engines that were built before."""
    yield from (e["key"] for e in manifest.engines if "key" in e)
    yield from cache.known() if cache else ()


def _wanted(
    manifest: Manifest,
    engine: str,
    sm: int | None,
    precision: str,
    attention: str | None,
    workload: Workload,
    refit: str | None,
    provider: str,
) -> list[_Plan]:
    """Which engines are asked for, with every choice made."""
    if engine not in ENGINES:
        raise BuildError(f"no engine {engine!r}; there are {', '.join(ENGINES)}")
    common: dict[str, Any] = {"weights": manifest.weights, "flavour": engine, "precision": precision}
    if engine == "onnxruntime":
        import onnxruntime

        from stca.runtime.engine import require_provider

        if sm is not None or refit is not None or workload != Workload():
            raise BuildError("onnxruntime engines are for any GPU, any size and no refit: leave such options out")
        require_provider(provider)
        if attention not in (None, "function"):
            raise BuildError(f"onnxruntime runs the operator's function body; it has no attention {attention!r}")
        common |= {"version": onnxruntime.__version__, "sm": None, "attention": "function", "provider": provider}
    else:
        flavour = FLAVOURS[engine]
        if provider != "CPUExecutionProvider":
            raise BuildError(f"provider {provider}: is ONNX Runtime's; {engine} has none")
        if sm is None and flavour.ahead_of_time:
            raise BuildError(
                f"SM not given: {engine} builds for a GPU that need not be here; say which with --sm, 89 for 8.9"
            )
        chosen = attention or ("decomposed" if precision == "fp32" and flavour.ahead_of_time else flavour.attentions[0])
        if chosen not in flavour.attentions:
            raise BuildError(f"{engine} has no attention {chosen!r}; it has {', '.join(flavour.attentions)}")
        if workload.requests_max > 1 and chosen != "plugin":
            ways = "; take the plugin" if "plugin" in flavour.attentions else ""
            raise BuildError(
                f"{engine} serves one request per run with {chosen} attention, not {workload.requests_max}: leave "
                f"--requests-max at 1{ways}"
            )
        common |= {
            "version": installed_version(flavour),
            "sm": sm,
            "attention": chosen,
            "refit": refit or flavour.refit,
            "requests": workload.requests_max,
        }
        if sm is None and not flavour.ahead_of_time:
            common["sm"] = _sm_here(engine)
        if chosen == "plugin":
            common["plugin"] = _digest_of(Path(__file__).parent / "plugins")
            common["triton"] = importlib.metadata.version("triton")  # compiles the kernels
    common["builder"] = _digest_of(*(Path(__file__).parent / name for name in _BUILDER))
    common["onnx"] = importlib.metadata.version("onnx")
    if given := [d for d in workload.sizes if d in _OPTIONS]:
        raise BuildError(f"the size of {given[0]} has an option of its own: {_OPTIONS[given[0]]}")
    known = {n for half in HALVES for t in manifest.graphs[half].inputs for n in t.shape if isinstance(n, str)}
    if unknown := [d for d in workload.sizes if d not in known]:
        raise BuildError(f"no dimension {unknown[0]!r} to give a size to; there are {', '.join(sorted(known))}")
    plans = []
    for half in HALVES:
        spec = manifest.graphs[half]
        dims = {n: None for t in spec.inputs for n in t.shape if isinstance(n, str)}
        if workload.requests_max == 1:
            dims = {d: None for d in dims if d not in ("B", "B_plus_1")}
        profiles = [] if engine == "onnxruntime" else workload.profiles(list(dims), manifest.max_history)
        parts = {
            "name": half,
            "graph": manifest.files[spec.file]["sha256"],
            **common,
            "profiles": [{d: list(sizes) for d, sizes in p.items()} for p in profiles],
        }
        plans.append(_Plan(half, _file_name(half, spec.file, parts), parts))
    return plans


_OPTIONS: Final = dict.fromkeys(("B", "B_plus_1"), "--requests-max") | {"N_h": "--history-max", "N_t": "--targets-max"}


def _sm_here(engine: str) -> int:
    from stca.plugins.ptx_launch import device_sm

    try:
        return device_sm()
    except BuildError as e:
        raise BuildError(f"{engine} builds on the GPU that is to run it: {e}; --sm NN --dry-run forecasts") from e


# Sources that decide what an engine computes besides what it is built from, the operator's function body among them.
_BUILDER: Final = (
    "engine_checks.py",
    "tensorrt_builder.py",
    "tensorrt_flavours.py",
    *(f"export/{name}.py" for name in ("cost", "engine_graph", "lower", "precision", "scope")),
    *(f"plugins/{name}.py" for name in ("onnx_function", "spec")),
)


def _digest_of(*paths: Path) -> str:
    """Digest of source files; of a folder, all that lie in it and below: the table of tiles is one of them."""
    digest = hashlib.sha256()
    for path in paths:
        below = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for file in sorted(below) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _file_name(half: str, graph_file: str, parts: Mapping[str, Any]) -> str:
    if parts["flavour"] != "onnxruntime":
        return f"{half}.{parts['flavour']}.sm{parts['sm']}.{parts['precision']}.plan"
    if parts["precision"] == "fp32":
        return graph_file
    provider = parts["provider"].removesuffix("ExecutionProvider").lower()
    return f"{half}.onnxruntime.{provider}.{parts['precision']}.onnx"


def _build_one(
    bundle: Bundle, plan: _Plan, padded: Sequence[str], folder: Path, cache: EngineCache | None, progress: Progress
) -> tuple[dict[str, Any], Path | None]:
    """The manifest entry of a new engine, and its file where it is not one the bundle has."""
    parts = plan.parts
    entry: dict[str, Any] = {
        **{name: parts[name] for name in ("flavour", "version", "sm", "precision", "attention", "profiles")},
        "graph": plan.graph,
        "file": plan.file,
        "key": parts,
    }
    if parts["flavour"] == "onnxruntime":
        return _build_onnxruntime(bundle, plan, entry, folder)
    file = folder / plan.file
    timing = cache.timing(parts["flavour"], parts["version"], parts["sm"]) if cache else None
    job = job_of(bundle, parts, plan=str(file), timing_cache=str(timing) if timing else None)
    built = build_plan(job, progress)
    entry |= {
        "attention": parts["attention"] if built.attention_nodes else None,
        "version": built.version,
        "sm": built.sm,
        "requests": parts["requests"],
        "padded": list(padded),
        "refit": parts["refit"],
        "inputs": [{"name": n, "dtype": d, "shape": s} for n, d, s in built.inputs],
        "outputs": [{"name": n, "dtype": d, "shape": s} for n, d, s in built.outputs],
        "layers": built.layers,
        "fused_layers": built.fused_layers,
        "memory": built.memory,
        "seconds": round(built.seconds, 3),
        "bytes": file.stat().st_size,
    }
    keep(cache, plan.key, entry, file, progress)
    return entry, file


def keep(cache: EngineCache | None, key: str, entry: Mapping[str, Any], file: Path, progress: Progress) -> None:
    """Put an engine into the cache; one that cannot be written to loses nobody a finished engine."""
    if cache:
        try:
            cache.put(key, entry, file)
        except OSError as e:
            progress(f"{entry['file']} is not kept in {cache.root} ({e.strerror}); --no-cache does without")


def job_of(bundle: Bundle, parts: Mapping[str, Any], **more: Any) -> Job:
    """What the building process is asked for an engine with these parts, over the graphs of `bundle`."""
    return Job(
        graph=str(bundle.file(parts["name"]).absolute()),
        state=[s.name for s in bundle.manifest.state],
        **{name: parts[name] for name in ("flavour", "precision", "attention", "profiles", "sm", "refit", "requests")},
        **more,
    )


def _build_onnxruntime(
    bundle: Bundle, plan: _Plan, entry: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Path | None]:
    """ONNX Runtime compiles when it loads, so what is built is the typed graph; float32 is the bundle's own file."""
    from stca.export.engine_graph import engine_graph
    from stca.runtime import OnnxRuntimeEngine

    began = time.monotonic()
    file, precision, provider = bundle.file(plan.graph), plan.parts["precision"], plan.parts["provider"]
    graph = engine_graph(file, state=[s.name for s in bundle.manifest.state], precision=precision)
    if precision != "fp32":
        file = graph.save(folder / plan.file)
    try:
        engine = OnnxRuntimeEngine(file, threads=1, providers=(provider,))
    except BuildError as e:
        if "NOT_IMPLEMENTED" not in str(e):
            raise
        raise BuildError(f"ONNX Runtime's {provider} has no {precision} kernels for {plan.graph}; take fp32") from e
    entry |= {
        "attention": "function" if graph.attention_nodes else None,
        "requests": None,
        "refit": "none",
        "inputs": [],
        "outputs": list(engine.outputs),
        "provider": provider,
        "seconds": round(time.monotonic() - began, 3),
        "bytes": sum(p.stat().st_size for p in with_weights(file)),
    }
    return entry, None if file == bundle.file(plan.graph) else file


def _write(bundle: Bundle, engines: Sequence[tuple[Mapping[str, Any], Path | None]]) -> None:
    """The bundle with these engines added, and with those that other builds have added meanwhile."""
    while True:
        try:
            return _add(bundle, engines)
        except BundleChangedError:
            now = Bundle.load(bundle.path)
            if _model_of(now.manifest) != _model_of(bundle.manifest):
                raise
            bundle = now


def _model_of(manifest: Manifest) -> tuple[Any, ...]:
    """What engines are made from."""
    return manifest.weights, {g.file: manifest.files[g.file] for g in manifest.graphs.values()}


def _add(bundle: Bundle, engines: Sequence[tuple[Mapping[str, Any], Path | None]]) -> None:
    """Put each engine in the place of the one that served the same, in one step for all."""
    added = [place_of(entry) for entry, _ in engines]
    kept = [e for e in bundle.manifest.engines if place_of(e) not in added]
    entries = [{n: x for n, x in entry.items() if n not in ("cache", "why")} for entry, _ in engines]
    with writing(bundle.path, replaces=bundle.manifest) as (work, commit):
        for entry, file in engines:
            for part in with_weights(file) if file else ():  # a plan from the cache has another name there
                shutil.copyfile(part, (work / entry["file"]).with_suffix(part.suffix))
        gone = {e["file"] for e in bundle.manifest.engines} - {e["file"] for e in (*kept, *entries)}
        gone = {part for name in gone for part in (name, str(Path(name).with_suffix(".weights")))}
        for name in bundle.manifest.files.keys() - gone:
            if not (work / name).exists():
                share(bundle.path / name, work / name)
        commit(dataclasses.replace(bundle.manifest, engines=(*kept, *entries)))


def place_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a bundle has one engine for: the graph first, then what the engines of both halves have in common."""
    return tuple(entry.get(name) for name in ("graph", "flavour", "provider", "precision", "sm"))


def share(source: Path, target: Path) -> None:
    """One file under two names, or a copy where that cannot be had.

    Weights are always copied. ONNX refuses external data that has two names, and a process killed before it took the
    second name away would leave the old bundle unreadable.
    """
    if source.name != WEIGHTS and source.suffix != ".weights":
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def with_weights(file: Path) -> Iterator[Path]:
    """An engine's files: itself, and the weights that a typed graph has beside it."""
    yield file
    if (weights := file.with_suffix(".weights")).exists():
        yield weights


def _manifest(root: Path) -> Manifest:
    """The manifest alone: whether an engine is there already must not cost a digest of all weights."""
    try:
        return Manifest.from_json((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return Bundle.load(root).manifest  # says what is wrong


def _is_whole(root: Path, manifest: Manifest, name: str) -> bool:
    entry, file = manifest.files.get(name), root / name
    return entry is not None and file.is_file() and not file.is_symlink() and sha256_of(file) == entry["sha256"]


_NOT_SHOWN: Final = ("key", "layers", "fused_layers", "inputs", "outputs")


def _result(root: Path, plan: _Plan, entry: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in entry.items() if name not in _NOT_SHOWN}
    first = ("graph", "path", "bytes", "seconds", "precision", "profiles")
    shown["path"] = str(root / plan.file)
    return {name: shown[name] for name in (*first, *(n for n in shown if n not in first)) if name in shown}


def _forecast(root: Path, manifest: Manifest, plan: _Plan, found: Mapping[str, Any]) -> dict[str, Any]:
    """What would be built, and the memory it takes at the largest sizes."""
    from stca.export.engine_graph import engine_graph, estimate_memory

    graph = engine_graph(
        root / manifest.graphs[plan.graph].file,
        state=[s.name for s in manifest.state],
        precision=plan.parts["precision"],
        attention=plan.parts["attention"],
    )
    largest = largest_sizes(plan.parts["profiles"])
    dims = {d.dim_param for v in graph.model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    memory = estimate_memory(graph, {d: largest.get(d, 1) for d in dims})
    if not plan.parts["profiles"]:  # any size will do
        memory = {"weights": memory["weights"]}
    shown = {name: plan.parts[name] for name in ("flavour", "version", "sm", "precision", "attention", "profiles")}
    shown["attention"] = shown["attention"] if graph.attention_nodes else None
    entry = {**shown, "graph": plan.graph, "memory": memory, "cache": found["cache"], "why": found["why"]}
    return _result(root, plan, entry)
