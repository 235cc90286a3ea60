"""How long does a request take, and what did each step buy? Latency per stage, with its baseline in the same run.

Everything is measured through `Session`, on the engines that were asked for. Stages: `miss` and `hit` are a whole
`Session.answer` without and with a kept state, `user_encoder` is what a miss spends on making the state,
`target_scorer` what a hit spends on scores from it. `pointwise`, the baseline, is what serving without request-level
batching costs: the unsplit request graph in ONNX Runtime, with every target as a request of its own, each with its own
copy of the history.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stca import probe, versions
from stca.arrays import Array, Progress, Step
from stca.bundle import Bundle
from stca.checks.forecast import forecast
from stca.checks.row_by_row import pointwise_feeds
from stca.checks.timing import machine, measure, measure_in_turn
from stca.errors import BuildError, RequestError, told
from stca.runtime import Engine, OnnxRuntimeEngine, OnnxRuntimeOptions, Request, Session
from stca.runtime.tables import with_tables
from stca.specs import OFFSETS, POINTWISE, TensorSpec

if TYPE_CHECKING:
    from stca.checks.ceilings import CpuCeilings

GRAPHS = "graphs"  # the bundle's own, which need no build
# Targets of which the pointwise baseline is measured; its cost is proportional to them, and shown scaled to all.
POINTWISE_TARGETS = 2
# A lifted model's baseline is one batch of all targets, up to this many tokens of copied histories.
POINTWISE_TOKENS = 200_000


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one stage at one size, in milliseconds.

    `measured_targets` is how many targets were run; where it is less than `targets`, the times are scaled up to them.
    `engine` is what ran it: `graphs` for the bundle's own, in ONNX Runtime.
    """

    history: int
    targets: int
    stage: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    measured_targets: int
    engine: str = GRAPHS


@dataclass(frozen=True)
class LatencyRatios:
    """Ratios of medians of one run: what request-level batching bought, and what keeping the state buys on top.

    The baseline is ONNX Runtime's: no other engine is divided by it.
    """

    history: int
    targets: int
    pointwise_over_miss: float | None
    miss_over_hit: float
    engine: str = GRAPHS


@dataclass(frozen=True)
class LatencyReport:
    """What `bench` found; the machine, the engines and the versions belong to the figures.

    Attributes:
        rows, ratios: of every engine that ran.
        machine: what they were measured on.
        engines: what ran the first engine's halves, and the request graph for the baseline.
        precision: of the bundle's own graphs.
        state_bytes: of a user's state in the first engine, by history.
        versions: of what made the figures.
        cached: the share of a request's work that a kept state saves, as the cut counted it.
        measured: for each engine that ran, what its halves are called.
        absent: for each that was asked for and cannot run here, why not.
        predicted: milliseconds of the stages of `graphs` by history and targets, from its counted work at this CPU's
            rates, which were measured in the same run; empty where that was not asked or `onnx` is not here.
        unpredicted: why nothing is predicted though it was asked; empty otherwise.
    """

    rows: tuple[LatencyRow, ...]
    ratios: tuple[LatencyRatios, ...]
    machine: dict[str, Any]
    engines: dict[str, str]
    precision: str
    state_bytes: dict[int, int]
    versions: dict[str, str]
    cached: float
    measured: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    predicted: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    unpredicted: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["state_bytes"] = {str(n): size for n, size in self.state_bytes.items()}
        plain["predicted"] = [{"history": n, "targets": m, **ms} for (n, m), ms in self.predicted.items()]
        return plain


def bench(
    bundle: Bundle,
    histories: Sequence[int],
    targets: Sequence[int],
    *,
    engines: Sequence[str] = (GRAPHS,),
    precision: str | None = None,
    onnxruntime: OnnxRuntimeOptions | None = None,
    gpu: int = 0,
    native_code: bool = False,
    threads: int | None = None,
    seconds: float = 1.0,
    pointwise: bool = True,
    predict: bool = False,
    progress: Progress = lambda _: None,
) -> LatencyReport:
    """Measure every stage of `bundle` at every pair of `histories` and `targets`.

    Args:
        bundle: a loaded bundle.
        histories, targets: tokens and targets of one request.
        engines: what to run it on, in turn: `graphs` for the bundle's own in ONNX Runtime, or engines built before.
        precision: of the built engines; None takes each one's fastest.
        onnxruntime: providers and settings for `graphs`.
        gpu: number of the GPU for TensorRT's engines.
        native_code: open engines that carry native code.
        threads: threads of one request; None takes every core.
        seconds: time given to each figure; a run that takes longer is still repeated 5 times. The stages of one size
            are run in turn.
        pointwise: whether to measure the baseline too.
        predict: whether to measure this CPU's rates too, and say what they make one expect of `graphs`.
        progress: told each size as it starts.

    Raises:
        RequestError: when a history is longer than the bundle serves.
        BuildError: when none of the engines can run here, with each one's reason.
    """
    real, counts = _sizes_that_run(bundle, histories, targets, progress)
    given = {"precision": precision, "onnxruntime": onnxruntime, "gpu": gpu, "native_code": native_code}
    sessions, absent = _sessions(bundle, engines, threads, given)
    first = next(iter(sessions))
    names = dict(sessions[first].engines)
    baseline = {
        n: with_tables(bundle, n, OnnxRuntimeEngine(bundle.file(n), threads=threads))
        for n in ("request", POINTWISE)
        if pointwise and n in bundle.manifest.graphs
    }
    names |= {name: engine.name for name, engine in baseline.items()}
    rng = np.random.default_rng(0)
    rows: list[LatencyRow] = []
    ratios: list[LatencyRatios] = []
    state_bytes: dict[int, int] = {}
    sizes = list(itertools.product(real, counts))
    for history, m in sizes:
        progress(Step(f"history {history}, {m} targets", len(ratios), len(sizes) * len(sessions)))
        request = probe.single(bundle.manifest.graphs["request"].inputs, history, m, rng)
        found = _at(bundle, sessions, baseline, request, (history, m), seconds)
        rows += found[0]
        ratios += found[1]
        state_bytes[history] = sessions[first].stats().bytes
    predicted, unpredicted = {}, ""
    if predict and GRAPHS in sessions and onnxruntime is None and importlib.util.find_spec("onnx"):
        progress("this CPU's rates")
        try:
            predicted = _predicted(bundle, sessions[GRAPHS], threads, sizes)
        except Exception as e:  # whatever a model does to a forecast, what was measured is worth more
            unpredicted = told(e)
    return LatencyReport(
        tuple(rows),
        tuple(ratios),
        machine(threads),
        names,
        bundle.manifest.precision,
        state_bytes,
        versions.installed(),
        bundle.manifest.cached,
        {name: dict(session.engines) for name, session in sessions.items()},
        absent,
        predicted,
        unpredicted,
    )


def _sizes_that_run(
    bundle: Bundle, histories: Sequence[int], targets: Sequence[int], progress: Progress
) -> tuple[list[int], list[int]]:
    """The histories and numbers of targets that the model takes, for those that were asked for."""
    graph, limit = bundle.manifest.graphs["request"], bundle.manifest.max_history
    real = list(dict.fromkeys(probe.history_of(graph.inputs, n) for n in histories))
    counts = list(dict.fromkeys(probe.targets_of(graph, m) for m in targets))
    if limit is not None and max(real) > limit:
        raise RequestError(f"--history {max(real)}: this bundle serves at most {limit} tokens")
    if real != list(histories):
        fixed = f"history has a fixed length: measured with {real[0]} events" if real[0] else "users have no history"
        progress(f"the model's {fixed}")
    if counts != list(targets):
        progress(f"the model scores a fixed number of targets: measured with {counts[0]}")
    return real, counts


def _predicted(
    bundle: Bundle, session: Session, threads: int | None, sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], dict[str, float]]:
    """Milliseconds of the stages of the bundle's own graphs, by history and targets, at this CPU's rates."""
    rates = _rates(bundle, session, threads)
    return {(n, m): forecast(bundle, rates, n, m).milliseconds() for n, m in sizes}


def _at(
    bundle: Bundle,
    sessions: Mapping[str, Session],
    baseline: Mapping[str, Engine],
    request: dict[str, Any],
    size: tuple[int, int],
    seconds: float,
) -> tuple[list[LatencyRow], list[LatencyRatios]]:
    """All stages of all engines at one size, and the baseline where there is one."""
    history, m = size
    timed = _measured(sessions, request, seconds)
    rows: list[LatencyRow] = []
    alone: float | None = None
    if baseline:
        k = _baseline_targets(bundle, history, m)
        times = measure(_pointwise(baseline, bundle, request, k), seconds) * (m / k)
        rows.append(_row(GRAPHS, "pointwise", history, m, times, k))
        alone = float(np.median(times))
    ratios = []
    for engine, stages in timed.items():
        rows += [_row(engine, stage, history, m, times, m) for stage, times in stages.items()]
        medians = {stage: float(np.median(t)) for stage, t in stages.items()}
        over_miss = alone / medians["miss"] if alone is not None and engine == GRAPHS else None
        ratios.append(LatencyRatios(history, m, over_miss, medians["miss"] / medians["hit"], engine))
    return rows, ratios


def cpu_rates(bundle: Bundle, threads: int | None = None) -> CpuCeilings:
    """What this CPU reaches on a bundle's own graphs, measured now; needs `onnx`."""
    sessions, _ = _sessions(bundle, (GRAPHS,), threads, {"onnxruntime": None})
    return _rates(bundle, sessions[GRAPHS], threads)


def _rates(bundle: Bundle, session: Session, threads: int | None) -> CpuCeilings:
    """The smallest request tells what is spent around the arithmetic."""
    from stca.checks.ceilings import measure_ceilings

    specs, least = bundle.manifest.graphs["request"].inputs, max(1, bundle.manifest.min_history or 0)
    smallest = probe.single(specs, least, 1, np.random.default_rng(0))
    timed = _measured({GRAPHS: session}, smallest, 0.1)[GRAPHS]
    return measure_ceilings(bundle, {stage: float(np.median(t)) for stage, t in timed.items()}, threads)


def _sessions(
    bundle: Bundle, engines: Sequence[str], threads: int | None, given: Mapping[str, Any]
) -> tuple[dict[str, Session], dict[str, str]]:
    """A session on each engine that can run here, and why the others cannot."""
    sessions: dict[str, Session] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys(engines):
        skipped = "precision" if name == GRAPHS else "onnxruntime"
        options = {option: value for option, value in given.items() if option != skipped}
        try:
            sessions[name] = Session.load(bundle.path, threads=threads, cache_bytes=1 << 40, engine=name, **options)
        except BuildError as e:
            absent[name] = str(e)
    if not sessions:
        raise BuildError("; ".join(absent.values()))
    return sessions, absent


def _row(engine: str, stage: str, history: int, targets: int, times: Array, measured: int) -> LatencyRow:
    p50, p95, p99 = (float(np.percentile(times, p)) * 1e3 for p in (50, 95, 99))
    return LatencyRow(history, targets, stage, p50, p95, p99, len(times), measured, engine)


def _measured(sessions: Mapping[str, Session], inputs: dict[str, Any], seconds: float) -> dict[str, dict[str, Array]]:
    """Seconds of each stage of each engine; all engines take turns."""
    request = Request(inputs, user="bench", version=0)
    runs: dict[str, Callable[[], object]] = {}
    inside: dict[str, list[float]] = {}

    def answer(name: str, session: Session, miss: bool) -> None:
        if miss:
            session.forget("bench")
        answered = session.answer(request)  # a miss ran before each hit, and left the state
        if answered.hits[0] is miss:
            raise RequestError("the user's state is not kept between requests: there is no hit to measure")
        inside[name].append(answered.seconds["encode" if miss else "score"])

    for engine, session in sessions.items():
        for way in ("miss", "hit"):
            name = f"{engine} {way}"
            inside[name] = []
            runs[name] = functools.partial(answer, name, session, way == "miss")
    times = measure_in_turn(runs, seconds, warm=_WARM)
    parts = {name: np.array(t[_WARM:]) for name, t in inside.items()}
    return {
        engine: {
            "user_encoder": parts[f"{engine} miss"],
            "target_scorer": parts[f"{engine} hit"],
            "miss": times[f"{engine} miss"],
            "hit": times[f"{engine} hit"],
        }
        for engine in sessions
    }


# A shape's third run is the first that TensorRT replays as a CUDA graph.
_WARM = 3


def _baseline_targets(bundle: Bundle, history: int, targets: int) -> int:
    """How many targets the baseline is measured with: all where it is one batch of copies and they fit in memory."""
    if POINTWISE not in bundle.manifest.graphs and not probe.shared_rows(bundle.manifest.graphs["request"].inputs):
        return min(targets, POINTWISE_TARGETS)
    return min(targets, max(POINTWISE_TARGETS, POINTWISE_TOKENS // max(1, history)))


def _pointwise(
    engines: Mapping[str, Engine], bundle: Bundle, inputs: dict[str, Any], targets: int
) -> Callable[[], object]:
    """What serves `targets` without request-level batching.

    A lifted bundle has the graph it was lifted from, and one that was not lifted is that graph: one batch, with the
    user copied to each target. Any other has
    the request graph with as many requests of one target each, one after the other where it takes no batches.
    """
    engine = engines["request"]
    if POINTWISE in engines:
        feeds = pointwise_feeds(bundle.manifest, inputs, np.arange(targets))
        given = {s.name: feeds[s.name] for s in bundle.manifest.graphs[POINTWISE].inputs}
        return lambda: engines[POINTWISE].run(given)
    specs = bundle.manifest.graphs["request"].inputs
    if shared := probe.shared_rows(specs):
        rows = {s.name: next(i for i, n in enumerate(s.shape) if n in shared) for s in specs if shared & {*s.shape}}
        some = {n: x.take(range(targets), rows[n]) if n in rows else x for n, x in inputs.items()}
        return lambda: engine.run(some)
    sizes = probe.row_sizes(specs, 1, 2)
    axis = {s.name: [sizes.get(str(n)) for n in s.shape].index(2) for s in specs if _has_targets(s, sizes)}
    singles = [{n: x.take([i], axis[n]) if n in axis else x for n, x in inputs.items()} for i in range(targets)]
    if any(s.is_offsets for s in specs):
        batch = probe.pack(specs, singles)
        return lambda: engine.run(batch)
    return lambda: [engine.run(single) for single in singles]


def _has_targets(spec: TensorSpec, sizes: Mapping[str, int]) -> bool:
    return spec.scope == "target" and any(sizes.get(str(n)) == 2 and n != OFFSETS for n in spec.shape)
