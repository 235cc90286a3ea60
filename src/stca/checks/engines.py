"""Checks of engines, and of the graphs they are built from, against the model they stand for."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np

from stca import probe
from stca.arrays import Array, Progress
from stca.bundle import Bundle
from stca.checks import verify
from stca.checks.blame import EPS, bisect, evaluator
from stca.checks.quantized import own_error
from stca.checks.tolerance import Tolerance, compare
from stca.errors import BuildError, EngineError, ParityError
from stca.export.engine_graph import engine_graph
from stca.runtime import OnnxRuntimeEngine
from stca.runtime.engine import Engine, scores_of
from stca.runtime.engine_choice import Choice, open_engines
from stca.runtime.tables import Lookups, with_tables
from stca.specs import HALVES, TARGETS, TOKENS, GraphSpec, TensorSpec
from stca.tensorrt_flavours import largest_sizes

if TYPE_CHECKING:
    from torch import nn


# Requests every engine is asked, one at a time, as (history tokens, targets).
ENGINE_PROBES: Final = ((0, 16), (1, 16), (64, 1), (300, 64))
_TORCH: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_graphs(
    bundle: Bundle,
    lowering: Literal["plugin", "quick", "fused", "decomposed"],
    folder: Path,
    *,
    one_request: bool = True,
) -> dict[str, list[str]]:
    """Run the graphs that engines are made from on ONNX Runtime, and find out which rows may be added to an input.

    They are held against the bundle's own in float32, request by request. The histories have 0, 1 and 9 tokens; an
    empty one is given as one token of zeros, as the runtime gives it. In a plugin's place stands the function body,
    which computes the same.

    Args:
        lowering: how the operator gets into the engine.
        folder: for the graphs and their weights.
        one_request: whether an engine with plugins serves one request per run.

    Returns:
        For each half those of the dimensions `N_h` and `N_t` in which rows beyond the last offset change no other row.

    Raises:
        BuildError: when a score differs by more than float32 can explain.
    """
    own = {half: _literal(bundle, half, bundle.file(half)) for half in HALVES}
    state = [s.name for s in bundle.manifest.state]
    form: Literal["function", "fused", "decomposed"] = (
        "function" if lowering == "plugin" or lowering == "quick" else lowering
    )
    lowered = {}
    for half in HALVES:
        graph = engine_graph(bundle.file(half), state=state, lowering=form, one_request=one_request)
        lowered[half] = _literal(bundle, half, graph.save(folder / f"{half}.check.onnx"))
    _check_lowering(bundle, own, lowered)
    return {half: _paddable(bundle, lowered, half) for half in HALVES}


def _literal(bundle: Bundle, half: str, file: Path) -> Engine:
    """What runs a half's graph, or one made of it, as it stands."""
    return with_tables(bundle, half, OnnxRuntimeEngine(file, threads=1, literal=True))


def _check_lowering(bundle: Bundle, own: Mapping[str, Engine], lowered: Mapping[str, Engine]) -> None:
    specs = bundle.manifest.graphs["request"].inputs
    for tokens in dict.fromkeys(max(n, bundle.manifest.min_history or 0) for n in (0, 1, 9)):
        given = probe.pack(specs, [probe.single(specs, tokens, 3, np.random.default_rng(tokens))])
        values = _run_halves(own, given)
        if tokens == 0:
            per_token = {s.name for s in specs if s.shape[:1] == (TOKENS,)}
            given = {n: np.zeros((1, *x.shape[1:]), x.dtype) if n in per_token else x for n, x in given.items()}
        found = _run_halves(lowered, given)
        for name in own["target_scorer"].outputs:
            if not _same(values[name], found[name]):
                difference = np.abs(values[name].astype(np.float64) - found[name]).max()
                raise BuildError(
                    f"with one request per run {name} differs by {difference:.3g} at {tokens} history tokens; "
                    "this model's engines need the plugin (--lowering plugin) or ONNX Runtime"
                )


def _paddable(bundle: Bundle, engines: Mapping[str, Engine], half: str) -> list[str]:
    """Dimensions of a half that may be longer than its offsets say, shown by rows of random values there."""
    specs, graph = bundle.manifest.graphs["request"].inputs, bundle.manifest.graphs[half]
    longest = min(12, bundle.manifest.max_history or 12)
    request = probe.single(specs, longest, 5, np.random.default_rng(0))
    values = _run_halves(engines, probe.pack(specs, [request]))
    found = []
    for dim, scope, counts in ((TOKENS, "user", (longest // 2, 0)), (TARGETS, "target", (3,))):
        tensors = (*graph.inputs, *graph.outputs)
        if not any(dim in t.shape for t in tensors) or any(dim in t.shape[1:] for t in tensors):
            continue
        offsets = [s for s in specs if s.is_offsets and s.scope == scope]
        if all(_ignores_more(bundle, engines[half], graph, values, dim, offsets, used) for used in counts):
            found.append(dim)
    return found


def _ignores_more(
    bundle: Bundle,
    engine: Engine,
    graph: GraphSpec,
    values: Mapping[str, Array],
    dim: str,
    offsets: Sequence[TensorSpec],
    used: int,
) -> bool:
    """Whether rows of `dim` beyond the first `used`, which are all that the offsets count, change nothing."""
    short = {s.name: np.array([0, used], s.dtype) for s in offsets}
    short |= {s.name: short[s.input] for s in bundle.manifest.state if s.input in short}
    rows = max(1, used)  # an empty history is one token that the offsets leave out
    cut = {t.name: values[t.name][:rows] for t in graph.inputs if t.shape[:1] == (dim,)}
    try:
        more = engine.run(_of(engine, {**values, **short}))
        less = engine.run(_of(engine, {**values, **short, **cut}))
    except EngineError:
        return False
    counted = {t.name: used if t.shape[:1] == (dim,) else None for t in graph.outputs}
    return all(_same(less[name][:n], more[name][:n]) for name, n in counted.items())


def _run_halves(engines: Mapping[str, Engine], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All of a request's values: its inputs, its state and its scores."""
    values = dict(feeds)
    for half in HALVES:
        values |= engines[half].run(_of(engines[half], values))
    return values


def _of(engine: Engine, values: Mapping[str, Array]) -> dict[str, Array]:
    return {spec.name: values[spec.name] for spec in engine.signature()[0]}


def _same(a: Array, b: Array) -> bool:
    """Equal as far as float32 goes; `a` has the scale."""
    wide = a.astype(np.float64)
    return np.allclose(wide, b, rtol=0, atol=64 * EPS["fp32"] * float(np.abs(wide).max(initial=0.0)))


def verify_engine(
    bundle: Bundle,
    choice: Choice,
    *,
    module: nn.Module | None = None,
    engines: Mapping[str, Engine] | None = None,
    probes: Sequence[tuple[int, int]] = ENGINE_PROBES,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> verify.ParityReport:
    """Compare a pair of engines with the float64 reference, and find the node at fault when they differ.

    The yardstick is PyTorch in the engines' precision or, for a bundle without a torch module, its own request graph
    in that precision; the engines may be off by twice its error, plus a rounding floor. Where the state is in 8 bits,
    what that costs in float64 is added to its error.

    Args:
        bundle: a loaded bundle.
        choice: which engines; `stca.runtime.engine_choice.best_engine` makes one.
        module: as in `stca.checks.verify.verify`.
        engines: the engines by half, loaded already; None loads them.
        probes: requests to ask, as (history tokens, targets); what is more than the engines serve is cut.
        seed: of the requests.
        progress: told each step as it starts.

    Raises:
        BuildError: when an engine cannot be loaded here.
        ParityError: when the scores differ, naming the first node that does.
    """
    manifest, precision = bundle.manifest, choice.precision
    specs = manifest.graphs["request"].inputs
    rng = np.random.default_rng(seed)
    probes = [(min(n, _most(bundle, choice, TOKENS)), min(m, _most(bundle, choice, TARGETS))) for n, m in probes]
    sizes = [[m] for _, m in probes]
    feeds = [probe.pack(specs, [probe.single(specs, n, m, rng)]) for n, m in probes]
    if module is None and manifest.model["kind"] == "stca":
        module = verify.rebuild(bundle)
    progress("float64 reference")
    if module is not None:
        exact, own = verify.in_form(module, "projected"), verify.in_form(module, manifest.attention)
        against, reference = "float64 torch", verify.run_module(manifest, exact, feeds, "float64")
        progress(f"torch in {precision}")
        near = verify.run_module(manifest, own, feeds, _TORCH[precision])
    else:
        against, reference = "float64 onnx.reference", verify.run_double(bundle, feeds)
        near = _run_typed(bundle, feeds, precision)
    near_name = f"{'onnx' if module is None else 'torch'} {precision}"
    yardstick = compare(near_name, against, near, reference, sizes, EPS[precision], None)
    largest = max(float(np.abs(x).max(initial=0.0)) for x in reference)
    if not yardstick.max_abs <= math.sqrt(EPS[precision]) * largest:
        raise ParityError(
            f"{near_name} is itself off by {yardstick.max_abs:.3g}, more than half of {precision}'s digits, so it "
            "cannot tell how far off engines may be; build them in another precision"
        )
    # In a low precision PyTorch's own scores need not rank as the reference does; they are what they are.
    yardstick = dataclasses.replace(yardstick, passed=True, limit=None)
    yardsticks = [yardstick]
    if manifest.rounding is not None:
        progress("the quantized state in float64")
        yardsticks.append(own_error(bundle, feeds, against, reference, sizes))
    tolerance = Tolerance.of(sum(y.max_abs for y in yardsticks), reference, EPS[precision])
    progress(f"engines: {choice.flavour} {precision}")
    engines = engines or open_engines(bundle, choice, threads=1)
    engines = {half: with_tables(bundle, half, engine) for half, engine in engines.items()}
    values = [_run_pair(bundle, engines, f) for f in feeds]
    name = f"{choice.flavour} {precision}"
    found = compare(name, against, values, reference, sizes, EPS[precision], tolerance)
    if not found.passed:
        raise ParityError(
            f"{name} differs from {against} by {found.max_abs:.3g} (limit {tolerance.limit:.3g}); "
            f"{_blame(bundle, choice, progress)}"
        )
    return verify.ParityReport(True, manifest.weights, precision, against, (*yardsticks, found))


def _most(bundle: Bundle, choice: Choice, dim: str) -> int:
    """How large the bundle and both engines let a dimension get."""
    limits = [bundle.manifest.max_history or sys.maxsize] if dim == TOKENS else [sys.maxsize]
    limits += [largest_sizes(entry.profiles).get(dim, sys.maxsize) for entry in choice.entries.values()]
    return min(limits)


def _blame(bundle: Bundle, choice: Choice, progress: Progress) -> str:
    """Which node of the graphs the engines were made from is the first to diverge."""
    precision = cast(Any, choice.precision)
    for half in HALVES:
        progress(f"bisecting {half}")
        entry = choice.entries.get(half)
        if entry is None or choice.flavour == "onnxruntime":
            suspect: Any = bundle.path / entry.file if entry else bundle.file(half)
        else:
            state = [s.name for s in bundle.manifest.state]
            # A plugin cannot be run here; the function body computes the same.
            lowering = cast(
                Any,
                {"plugin": "function", "quick": "function"}.get(kind := entry.key.get("lowering", "function"), kind),
            )
            one = entry.requests == 1
            suspect = engine_graph(
                bundle.file(half), state=state, precision=precision, lowering=lowering, one_request=one
            )
        if divergence := bisect(bundle, half, suspect, precision=precision):
            return str(divergence)
    return "no node of the graphs they were made from does, so it is the engines or a plugin in them: build them again"


def _run_pair(bundle: Bundle, engines: Mapping[str, Engine], feeds: Mapping[str, Array]) -> Array:
    graphs = bundle.manifest.graphs
    state = engines["user_encoder"].run({s.name: feeds[s.name] for s in graphs["user_encoder"].inputs})
    given = {**feeds, **state}
    outputs = engines["target_scorer"].run({s.name: given[s.name] for s in graphs["target_scorer"].inputs})
    return scores_of([outputs[s.name] for s in graphs["target_scorer"].outputs])


def _run_typed(bundle: Bundle, feeds: Sequence[Mapping[str, Array]], precision: str) -> list[Array]:
    graph = engine_graph(bundle.file("request"), state=(), precision=cast(Any, precision))
    runner, lookups = evaluator(graph.complete()), Lookups(bundle, "request")
    return [scores_of([np.asarray(x) for x in runner.run(None, lookups.complete(f))]) for f in feeds]
