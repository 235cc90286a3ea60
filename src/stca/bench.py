"""How long does a request take, and what did each step buy? Latency per stage, with its baseline in the same run.

Stages: `user_encoder` and `target_scorer` are the two engines alone; `miss` and `hit` are a whole `Session.score`
without and with a kept state; `pointwise`, the baseline, is what serving without request-level batching costs: the
unsplit request graph with every target as a request of its own, each with its own copy of the history.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stca import probe
from stca.bundle import OFFSETS, Bundle, TensorSpec
from stca.errors import RequestError
from stca.runtime import OnnxRuntimeEngine, Request, Session
from stca.types import Array, Progress

# Targets of which the pointwise baseline is measured; its cost is proportional to them, and shown scaled to all.
POINTWISE_TARGETS = 2


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one stage at one size, in milliseconds.

    `measured_targets` is how many targets were run; where it is less than `targets`, the times are scaled up to them.
    """

    history: int
    targets: int
    stage: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    measured_targets: int


@dataclass(frozen=True)
class LatencyRatios:
    """Ratios of medians of one run: what request-level batching bought, and what keeping the state buys on top."""

    history: int
    targets: int
    pointwise_over_miss: float | None
    miss_over_hit: float


@dataclass(frozen=True)
class LatencyReport:
    """What `bench` found; the machine and the engines belong to the figures."""

    rows: tuple[LatencyRow, ...]
    ratios: tuple[LatencyRatios, ...]
    machine: dict[str, Any]
    engines: dict[str, str]
    precision: str
    state_bytes: dict[int, int]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        plain = dataclasses.asdict(self)
        plain["state_bytes"] = {str(n): size for n, size in self.state_bytes.items()}
        return plain


def bench(
    bundle: Bundle,
    histories: Sequence[int],
    targets: Sequence[int],
    *,
    threads: int | None = None,
    seconds: float = 1.0,
    pointwise: bool = True,
    progress: Progress = lambda _: None,
) -> LatencyReport:
    """Measure every stage of `bundle` at every pair of `histories` and `targets`.

    Args:
        bundle: a loaded bundle; its own graphs are measured, in ONNX Runtime, whatever engines were built.
        histories, targets: tokens and targets of one request.
        threads: threads of one request; None takes every core.
        seconds: time given to each figure; a run that takes longer is still repeated 5 times.
        pointwise: whether to measure the baseline too.
        progress: told each size as it starts.

    Raises:
        RequestError: when a history is longer than the bundle serves.
    """
    limit = bundle.manifest.max_history
    if limit is not None and max(histories) > limit:
        raise RequestError(f"--history {max(histories)}: this bundle serves at most {limit} tokens")
    session = Session.load(bundle.path, threads=threads, cache_bytes=1 << 40, engine="graphs")
    engines = {name: OnnxRuntimeEngine(bundle.file(name), threads=threads) for name in bundle.manifest.graphs}
    specs = bundle.manifest.graphs["request"].inputs
    rng = np.random.default_rng(0)
    rows: list[LatencyRow] = []
    ratios: list[LatencyRatios] = []
    state_bytes: dict[int, int] = {}
    for history in histories:
        for m in targets:
            progress(f"history {history}, {m} targets")
            request = probe.single(specs, history, m, rng)
            stages = _stages(session, engines, bundle, request)
            times = {name: measure(run, seconds) for name, run in stages.items()}
            measured = dict.fromkeys(times, m)
            if pointwise:
                k = min(m, POINTWISE_TARGETS)
                times["pointwise"] = measure(_pointwise(engines["request"], bundle, request, k), seconds) * (m / k)
                measured["pointwise"] = k
            state_bytes[history] = session.stats().bytes
            for name, t in times.items():
                p50, p95, p99 = (float(np.percentile(t, p)) * 1e3 for p in (50, 95, 99))
                rows.append(LatencyRow(history, m, name, p50, p95, p99, len(t), measured[name]))
            medians = {name: float(np.median(t)) for name, t in times.items()}
            over_miss = medians["pointwise"] / medians["miss"] if pointwise else None
            ratios.append(LatencyRatios(history, m, over_miss, medians["miss"] / medians["hit"]))
    names = {name: engine.name for name, engine in engines.items()}
    return LatencyReport(tuple(rows), tuple(ratios), machine(threads), names, bundle.manifest.precision, state_bytes)


def measure(run: Callable[[], object], seconds: float, *, least: int = 5, most: int = 200) -> Array:
    """Seconds of each call of `run`, warmed up once: at least `least` calls, more until `seconds` have passed."""
    run()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return np.array(times)


def machine(threads: int | None) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "threads": threads or cores, "system": platform.system()}


def _stages(
    session: Session, engines: dict[str, OnnxRuntimeEngine], bundle: Bundle, inputs: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    specs = bundle.manifest.graphs
    feeds = probe.pack(specs["request"].inputs, [inputs])
    encoder_feeds = {s.name: feeds[s.name] for s in specs["user_encoder"].inputs}
    state = engines["user_encoder"].run(encoder_feeds)
    scorer_feeds = {s.name: {**feeds, **state}[s.name] for s in specs["target_scorer"].inputs}
    request = Request(inputs, user="bench", version=0)

    def miss() -> object:
        session.forget("bench")
        return session.score(request)

    return {
        "user_encoder": lambda: engines["user_encoder"].run(encoder_feeds),
        "target_scorer": lambda: engines["target_scorer"].run(scorer_feeds),
        "miss": miss,
        "hit": lambda: session.score(request),  # `miss` ran before it and left the state
    }


def _pointwise(engine: OnnxRuntimeEngine, bundle: Bundle, inputs: dict[str, Any], targets: int) -> Callable[[], object]:
    """The request graph with `targets` requests of one target each; one after the other where it takes no batches."""
    specs = bundle.manifest.graphs["request"].inputs
    sizes = probe.row_sizes(specs, 1, 2)
    axis = {s.name: [sizes.get(str(n)) for n in s.shape].index(2) for s in specs if _has_targets(s, sizes)}
    singles = [{n: x.take([i], axis[n]) if n in axis else x for n, x in inputs.items()} for i in range(targets)]
    if any(s.shape == (OFFSETS,) for s in specs):
        batch = probe.pack(specs, singles)
        return lambda: engine.run(batch)
    return lambda: [engine.run(single) for single in singles]


def _has_targets(spec: TensorSpec, sizes: Mapping[str, int]) -> bool:
    return spec.scope == "target" and any(sizes.get(str(n)) == 2 and n != OFFSETS for n in spec.shape)
