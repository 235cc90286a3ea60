"""What the server counts, as Prometheus reads it; every name begins with `stca_`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from stca.serve.models import Models, Served
from stca.serve.work import Work

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOGETHER: Final = (1, 2, 4, 8, 16, 32, 64)
_LABELS: Final = ("model", "version")
# What a state store tells apart by kind, and what it only ever adds to; all else is a size at this moment.
_BY_KIND: Final = frozenset({"hits_from", "misses_for"})
_COUNTED: Final = _BY_KIND | {
    "hits", "misses", "evictions", "refused", "expired", "warmed", "appends", "appended_bytes", "reads", "read_seconds",
    "writes", "written_bytes", "skipped", "discarded", "failed",
}  # fmt: skip


class Metrics:
    """Counters of one server.

    Args:
        models: whose sessions' stores are asked at each reading.
        work: whose queue is.
    """

    def __init__(self, models: Models, work: Work) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a line more for each counter, which nobody reads
        self._registry = CollectorRegistry()

        def made(kind: Any, name: str, told: str, *labels: str, **more: Any) -> Any:
            return kind(name, told, (*_LABELS, *labels), registry=self._registry, **more)

        self._requests = made(Counter, "stca_requests", "Requests, by what became of them.", "protocol", "code")
        self._seconds = made(
            Histogram, "stca_request_seconds", "From a request's arrival to its scores.", buckets=_SECONDS
        )
        self._changes = made(
            Counter, "stca_changes", "Calls of append, amend, forget, warm and swap.", "change", "code"
        )
        for name, told, read in (
            ("stca_admitted_requests", "Requests that are computed or wait.", lambda: work.admitted_now),
            ("stca_admitted_requests_limit", "Most of them; more are refused.", lambda: work.limit),
            ("stca_expected_wait_seconds", "How long a request would wait that came now.", lambda: work.wait),
            ("stca_ready", "Whether the server takes requests.", lambda: int(work.open)),
        ):
            Gauge(name, told, registry=self._registry).set_function(read)
        self._registry.register(_Collected(models, work))

    def answered(self, served: Served | None, protocol: str, code: str, seconds: float) -> None:
        """Count a request for scores.

        Args:
            served: the model; None for one that is not there.
            protocol: `http` or `grpc`.
            code: `ok`, or the error's.
            seconds: since its arrival.
        """
        of = ("", "") if served is None else (served.name, served.version)
        self._requests.labels(*of, protocol, code).inc()
        if served is not None:
            served.count(code == "ok", seconds)
            if code == "ok":
                self._seconds.labels(*of).observe(seconds)

    def changed(self, served: Served | None, change: str, code: str) -> None:
        """Count a change of a user's state or of a bundle."""
        of = ("", "") if served is None else (served.name, served.version)
        self._changes.labels(*of, change, code).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Collected(Collector):
    def __init__(self, models: Models, work: Work) -> None:
        self._models, self._work = models, work

    def collect(self) -> Iterator[Metric]:
        """How many requests each session computes together; what its store holds and did, field by field; and how many
        were refused for their deadlines.
        """
        batches = HistogramMetricFamily("stca_batch_requests", "Requests of a run.", labels=_LABELS)
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for served in self._models:
            if served.loaded is None:
                continue
            sizes = {size: of.times for size, of in served.loaded.runs().items()}
            batches.add_metric((served.name, served.version), *_cumulated(sizes))
            for field, kind, value in _numbers(dataclasses.asdict(served.loaded.stats())):
                name = f"stca_state_{field}"
                if name not in families:
                    made = CounterMetricFamily if field.removeprefix("file_") in _COUNTED else GaugeMetricFamily
                    labels = (*_LABELS, "kind") if kind else _LABELS
                    families[name] = made(name, f"The state store's {field.replace('_', ' ')}.", labels=labels)
                families[name].add_metric((served.name, served.version, *([kind] if kind else [])), value)
        told = "Requests refused as overloaded, whose deadlines were sooner than their turns."
        early = CounterMetricFamily("stca_refused_early", told, value=self._work.refused_early)
        return iter([batches, early, *families.values()])

    def describe(self) -> list[Metric]:
        """Nothing: what there is depends on what is loaded."""
        return []


def _cumulated(sizes: Mapping[int, int]) -> tuple[list[tuple[str, float]], float]:
    """Buckets of a histogram, each with all below it, and the sum; of counts by size."""
    buckets = [(str(most), float(sum(n for size, n in sizes.items() if size <= most))) for most in _TOGETHER]
    return [*buckets, ("+Inf", float(sum(sizes.values())))], float(sum(size * n for size, n in sizes.items()))


def _numbers(told: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, float]]:
    """Each number with its name, and its kind where it is one of several."""
    for name, value in told.items():
        if name in _BY_KIND:
            yield from ((f"{prefix}{name}", kind, count) for kind, count in value.items())
        elif isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}_")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", "", value
