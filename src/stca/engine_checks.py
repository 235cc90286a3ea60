"""Checks of engines, and of the graphs they are built from, against the model they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from stca import probe, verify
from stca.bisect import bisect
from stca.build import HALVES
from stca.bundle import Bundle
from stca.errors import BuildError, ParityError
from stca.export.engine_graph import engine_graph
from stca.runtime import OnnxRuntimeEngine
from stca.runtime.engine import Engine, scores_of
from stca.runtime.engine_choice import Choice, open_engines

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[Any]
Progress = Callable[[str], None]

# Requests every engine is asked, one at a time, as (history tokens, targets).
PROBES: Final = ((0, 16), (1, 16), (64, 1), (300, 64))
_EPS: Final = {"fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}
_TORCH: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_lowering(bundle: Bundle, form: Literal["fused", "decomposed"], folder: Path) -> None:
    """Run both lowered halves on ONNX Runtime in float32 against the bundle's own, request by request.

    The histories have 0, 1 and 9 tokens; an empty one is given as one token of zeros, as the runtime gives it.

    Args:
        folder: for the lowered graphs and their weights.

    Raises:
        BuildError: when a score differs by more than float32 can explain.
    """
    manifest = bundle.manifest
    state = [s.name for s in manifest.state]
    specs = manifest.graphs["request"].inputs
    own = [OnnxRuntimeEngine(bundle.file(half), threads=1) for half in HALVES]
    lowered = []
    for half in HALVES:
        graph = engine_graph(bundle.file(half), state=state, attention=form)
        file = graph.save(folder / f"{half}.check.onnx")
        lowered.append((OnnxRuntimeEngine(file, threads=1), [i.name for i in graph.model.graph.input]))
    for tokens in (0, 1, 9):
        feeds = probe.pack(specs, [probe.single(specs, tokens, 3, np.random.default_rng(tokens))])
        values = dict(feeds)
        for engine, half in zip(own, HALVES, strict=True):
            values |= engine.run({s.name: values[s.name] for s in manifest.graphs[half].inputs})
        if tokens == 0:
            per_token = {s.name for s in specs if s.shape[:1] == ("N_h",)}
            feeds = {n: np.zeros((1, *x.shape[1:]), x.dtype) if n in per_token else x for n, x in feeds.items()}
        given = dict(feeds)
        for engine, names in lowered:
            given |= engine.run({name: given[name] for name in names})
        for name in own[1].outputs:
            a, b = values[name].astype(np.float64), given[name].astype(np.float64)
            limit = 64 * _EPS["fp32"] * float(np.abs(a).max(initial=0.0))
            if not np.allclose(a, b, rtol=0, atol=limit):
                raise BuildError(
                    f"with one request per run {name} differs by {np.abs(a - b).max():.3g} at {tokens} history tokens; "
                    "this model's engines need the plugin (--engine tensorrt) or ONNX Runtime"
                )


def verify_engine(
    bundle: Bundle,
    choice: Choice,
    *,
    module: nn.Module | None = None,
    engines: Mapping[str, Engine] | None = None,
    probes: Sequence[tuple[int, int]] = PROBES,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> verify.ParityReport:
    """Compare a pair of engines with the float64 reference, and find the node at fault when they differ.

    The yardstick is PyTorch in the engines' precision or, for a bundle without a torch module, its own request graph
    in that precision; the engines may be off by twice its error, plus a rounding floor.

    Args:
        bundle: a loaded bundle.
        choice: which engines; `stca.runtime.engine_choice.best_engine` makes one.
        module: as in `stca.verify.verify`.
        engines: the engines by half, loaded already; None loads them.
        probes: requests to ask, as (history tokens, targets); longer histories than the bundle serves are cut.
        seed: of the requests.
        progress: told each step as it starts.

    Raises:
        BuildError: when an engine cannot be loaded here.
        ParityError: when the scores differ, naming the first node that does.
    """
    manifest, precision = bundle.manifest, choice.precision
    specs = manifest.graphs["request"].inputs
    rng = np.random.default_rng(seed)
    longest = manifest.max_history or max(n for n, _ in probes)
    sizes = [[m] for _, m in probes]
    feeds = [probe.pack(specs, [probe.single(specs, min(n, longest), m, rng)]) for n, m in probes]
    if module is None and manifest.model["kind"] == "stca":
        module = verify.rebuild(bundle)
    progress("float64 reference")
    if module is not None:
        against, reference = "float64 torch", verify.run_torch(verify.in_form(module, "projected"), feeds, "float64")
        progress(f"torch in {precision}")
        near = verify.run_torch(verify.in_form(module, manifest.attention), feeds, _TORCH[precision])
    else:
        against, reference = "float64 onnx.reference", verify.run_double(bundle, feeds)
        near = _run_typed(bundle, feeds, precision)
    yardstick = verify.compare(f"torch {precision}", against, near, reference, sizes, _EPS[precision], None)
    # In a low precision PyTorch's own scores need not rank as the reference does; they are what they are.
    yardstick = dataclasses.replace(yardstick, passed=bool(np.isfinite(yardstick.max_abs)), limit=None)
    tolerance = verify.Tolerance.of(yardstick.max_abs, reference, _EPS[precision])
    progress(f"engines: {choice.flavour} {precision}")
    engines = engines or open_engines(bundle, choice, threads=1)
    values = [_run_pair(bundle, engines, f) for f in feeds]
    name = f"{choice.flavour} {precision}"
    found = verify.compare(name, against, values, reference, sizes, _EPS[precision], tolerance)
    if not found.passed:
        raise ParityError(
            f"{name} differs from {against} by {found.max_abs:.3g} (limit {tolerance.limit:.3g}); "
            f"{_blame(bundle, choice, progress)}"
        )
    return verify.ParityReport(True, manifest.weights, precision, against, (yardstick, found))


def _blame(bundle: Bundle, choice: Choice, progress: Progress) -> str:
    """Which node of the graphs the engines were made from is the first to diverge."""
    precision = cast(Any, choice.precision)
    for half in HALVES:
        progress(f"bisecting {half}")
        entry = choice.entries.get(half, {})
        if choice.flavour == "onnxruntime":
            suspect: Any = bundle.path / entry.get("file", bundle.manifest.graphs[half].file)
        else:
            state = [s.name for s in bundle.manifest.state]
            attention = cast(Any, entry["key"]["attention"])
            if attention == "plugin":
                return "its graphs hold plugins and cannot be bisected on ONNX Runtime"
            suspect = engine_graph(bundle.file(half), state=state, precision=precision, attention=attention)
        if divergence := bisect(bundle, half, suspect, precision=precision):
            return str(divergence)
    return "the graphs they were made from are right, so it is the engines: rebuild them, and report it if it stays"


def _run_pair(bundle: Bundle, engines: Mapping[str, Engine], feeds: Mapping[str, Array]) -> Array:
    graphs = bundle.manifest.graphs
    state = engines["user_encoder"].run({s.name: feeds[s.name] for s in graphs["user_encoder"].inputs})
    given = {**feeds, **state}
    outputs = engines["target_scorer"].run({s.name: given[s.name] for s in graphs["target_scorer"].inputs})
    return scores_of([outputs[s.name] for s in graphs["target_scorer"].outputs])


def _run_typed(bundle: Bundle, feeds: Sequence[Mapping[str, Array]], precision: str) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    graph = engine_graph(bundle.file("request"), state=(), precision=cast(Any, precision))
    evaluator: Any = ReferenceEvaluator(graph.complete())
    return [np.asarray(evaluator.run(None, dict(f))[0]) for f in feeds]
