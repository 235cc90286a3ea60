"""Engines from a bundle: both halves, typed, lowered where they must be, built once, and written into the bundle.

A build never changes numbers in silence. The lowered graphs are run against the bundle's own before an engine is made
of them; an engine without its fused attention is an error; and the manifest says of each engine what it can serve.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stca import folders
from stca.arrays import Progress
from stca.bundle import Bundle, BundleChangedError, scratch, sha256_of, writing
from stca.engines.builder import Plan, Wish, Workload, builder_of
from stca.engines.cache import EngineCache, trusted, why_missed
from stca.engines.files import digest_of_sources, place_of, with_weights
from stca.errors import BuildError
from stca.manifest import MANIFEST, MOST_BYTES, EngineEntry, Manifest
from stca.specs import HALVES
from stca.tensorrt_flavours import RefitMode, largest_sizes

__all__ = ["Workload", "build"]

if TYPE_CHECKING:
    from stca.export.engine_graph import Lowering
    from stca.export.passes.precision import Precision


def build(
    bundle: str | os.PathLike[str],
    *,
    engine: str,
    sm: int | None = None,
    precision: Precision = "fp32",
    lowering: Lowering | None = None,
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
        engine: one of `stca.backends.BACKENDS`.
        sm: compute capability to build for, 89 for 8.9; tensorrt takes this machine's GPU when it is None.
        precision: of weights and activations; `stca.export.passes.precision` says what stays float32.
        lowering: how the operator gets into the engine; None takes the flavour's own way. float32 has no fused
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
    root, cache = Path(bundle), trusted(cache, progress)
    manifest = _manifest(root)
    wish = Wish(sm, precision, lowering, workload or Workload(), refit, provider)
    plans, builder = _wanted(manifest, engine, wish), builder_of(engine)
    if lowering is None and plans[0].parts["lowering"] == "decomposed":
        progress(f"{engine} has no fused attention in {precision}: it is built of MatMul, Softmax and MatMul")
    held = {json.dumps(e.key, sort_keys=True): e for e in manifest.engines}
    known = functools.cache(lambda: list(_known(manifest, cache)))  # read where there is a miss, and once for both
    results: dict[str, dict[str, Any]] = {}
    fresh: dict[str, Path | None] = {}
    misses: list[Plan] = []
    for plan in plans:
        same = held.get(json.dumps(plan.parts, sort_keys=True))
        if same and _is_whole(root, manifest, same.file):
            results[plan.graph] = {**dataclasses.asdict(same), "cache": "hit", "why": "it is in the bundle"}
        elif cache and (found := cache.get(plan.key)):
            kept = dataclasses.asdict(found[0])
            results[plan.graph] = {**kept, "file": plan.file, "cache": "hit", "why": f"it is in {cache.root}"}
            fresh[plan.graph] = found[1]
        else:
            results[plan.graph] = {"cache": "miss", "why": why_missed(plan.parts, known())}
            misses.append(plan)
        progress(f"{plan.graph}: {results[plan.graph]['cache']}, {results[plan.graph]['why']}")
    if dry_run:
        if misses:
            builder.forecast(Bundle(root, manifest), misses[0], progress)
        return [_forecast(root, manifest, plan, results[plan.graph]) for plan in plans]
    if not misses and not fresh:
        return [_result(root, plan, results[plan.graph]) for plan in plans]
    loaded = Bundle.load(root)
    with scratch("stca-engines") as folder:
        padded = builder.check(loaded, misses[0], folder, progress) if misses else {}
        for plan in misses:
            progress(f"{plan.graph}: building for {engine} in {precision}")
            entry, file = builder.build(loaded, plan, padded.get(plan.graph, ()), folder, cache, progress)
            results[plan.graph] |= entry
            fresh[plan.graph] = file
        progress("writing the bundle")
        _write(loaded, [(results[g], file) for g, file in fresh.items()])
    return [_result(root, plan, results[plan.graph]) for plan in plans]


def _known(manifest: Manifest, cache: EngineCache | None) -> Iterator[Mapping[str, Any]]:
    """What went into engines that were built before."""
    yield from (e.key for e in manifest.engines if e.key)
    yield from cache.known() if cache else ()


def _wanted(manifest: Manifest, engine: str, wish: Wish) -> list[Plan]:
    """Which engines are asked for, with every choice made."""
    builder = builder_of(engine)
    common: dict[str, Any] = {"weights": manifest.weights, "flavour": engine, "precision": wish.precision}
    common |= builder.parts(wish)
    common["builder"] = digest_of_sources(*_BUILDER)
    common["onnx"] = importlib.metadata.version("onnx")
    workload = wish.workload
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
        profiles = workload.profiles(list(dims), manifest.max_history) if builder.sized else []
        parts = {
            "graph": half,
            "graph_sha256": manifest.files[spec.file]["sha256"],
            **common,
            "profiles": [{d: list(sizes) for d, sizes in p.items()} for p in profiles],
        }
        plans.append(Plan(half, builder.file_name(half, spec.file, parts), parts))
    return plans


_OPTIONS: Final = dict.fromkeys(("B", "B_plus_1"), "--requests-max") | {"N_h": "--history-max", "N_t": "--targets-max"}


# Sources that decide what an engine computes besides what it is built from, the operator's function body among them.
_BUILDER: Final = (
    "checks/engines.py",
    "engines/onnxruntime_backend.py",
    "engines/tensorrt_backend.py",
    "engines/tensorrt_builder.py",
    "tensorrt_flavours.py",
    "export/engine_graph.py",
    *(f"export/analysis/{name}.py" for name in ("cost", "integers", "operators", "scope")),
    *(f"export/passes/{name}.py" for name in ("lower", "nodes", "precision")),
    *(f"plugins/{name}.py" for name in ("onnx_function", "spec")),
)


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
    entries = [EngineEntry.of({n: x for n, x in e.items() if n not in ("cache", "why")}) for e, _ in engines]
    added = [place_of(entry) for entry in entries]
    kept = [e for e in bundle.manifest.engines if place_of(e) not in added]
    with writing(bundle.path, replaces=bundle.manifest) as (work, commit):
        for entry, file in engines:
            for part in with_weights(file) if file else ():  # a plan from the cache has another name there
                shutil.copyfile(part, (work / entry["file"]).with_suffix(part.suffix))
        gone = {e.file for e in bundle.manifest.engines} - {e.file for e in (*kept, *entries)}
        gone = {part for name in gone for part in (name, str(Path(name).with_suffix(".weights")))}
        for name in bundle.manifest.names - gone:
            if not (work / name).exists():
                folders.share(bundle.path / name, work / name)
        commit(dataclasses.replace(bundle.manifest, engines=(*kept, *entries)))


def _manifest(root: Path) -> Manifest:
    """The manifest alone: whether an engine is there already must not cost a digest of all weights."""
    try:
        return Manifest.from_json(folders.read(root / MANIFEST, MOST_BYTES).decode("utf-8"))
    except (OSError, UnicodeDecodeError):
        return Bundle.load(root).manifest  # says what is wrong


def _is_whole(root: Path, manifest: Manifest, name: str) -> bool:
    entry, file = manifest.files.get(name), root / name
    return entry is not None and file.is_file() and not file.is_symlink() and sha256_of(file) == entry["sha256"]


_NOT_SHOWN: Final = ("key", "layers", "fused_layers", "inputs", "outputs")


def _result(root: Path, plan: Plan, entry: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in entry.items() if name not in _NOT_SHOWN}
    first = ("graph", "path", "bytes", "seconds", "precision", "profiles")
    shown["path"] = str(root / plan.file)
    return {name: shown[name] for name in (*first, *(n for n in shown if n not in first)) if name in shown}


def _forecast(root: Path, manifest: Manifest, plan: Plan, found: Mapping[str, Any]) -> dict[str, Any]:
    """What would be built, and the memory it takes at the largest sizes."""
    from stca.export.engine_graph import engine_graph, estimate_memory

    graph = engine_graph(
        root / manifest.graphs[plan.graph].file,
        state=[s.name for s in manifest.state],
        precision=plan.parts["precision"],
        lowering=plan.parts["lowering"],
    )
    largest = largest_sizes(plan.parts["profiles"])
    dims = {d.dim_param for v in graph.model.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    memory = estimate_memory(graph, {d: largest.get(d, 1) for d in dims})
    if not plan.parts["profiles"]:  # any size will do
        memory = {"weights": memory["weights"]}
    shown = {name: plan.parts[name] for name in ("flavour", "version", "sm", "precision", "lowering", "profiles")}
    shown["lowering"] = shown["lowering"] if graph.attention_nodes else None
    entry = {**shown, "graph": plan.graph, "memory": memory, "cache": found["cache"], "why": found["why"]}
    return _result(root, plan, entry)
