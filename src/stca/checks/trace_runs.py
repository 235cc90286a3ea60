"""Bundles run on a trace, through the front door: what is not a valid request there is said with its number."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.timing import machine, measure_in_turn
from stca.errors import RequestError, UsageError
from stca.manifest import Manifest
from stca.runtime import Request, Session
from stca.runtime.request import Door
from stca.runtime.scoring import column_names
from stca.trace import Trace, Traced


def check_trace(trace: Trace, manifest: Manifest) -> None:
    """Raises UsageError when a trace has no requests, or its first one is not this model's."""
    first, door = next(iter(trace), None), Door(manifest)
    if first is None:
        raise UsageError(f"{trace.folder}: holds no request whole; record more")
    known = door.names("user", "request", "target")
    if not first.inputs.keys() <= set(known):
        has = f"its requests have {', '.join(first.inputs):.300}, and this bundle takes {', '.join(known):.300}"
        raise UsageError(f"{trace.folder}: is the trace of another model; {has}")
    with _of_request(0):
        door.admit(dict(first.inputs), "user", "request", "target")


@contextlib.contextmanager
def _of_request(number: int) -> Iterator[None]:
    """What is refused of a request of the trace is said with its number."""
    try:
        yield
    except RequestError as e:
        raise UsageError(f"the trace's request {number}: {e}; is the trace this model's?") from e


class TraceRuns:
    """Sessions on bundles' own graphs, which keep no states; see `stca.calibration.calibrate.Runner`.

    Args:
        threads: of one request; None takes every processor.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads

    def scores(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Array]:
        """Scores `(targets, tasks)` of each request.

        Raises:
            UsageError: naming the request of the trace that the bundle does not take, and why.
        """
        with self._session(bundle.path) as session:
            for number, traced in enumerate(requests):
                with _of_request(number):
                    scores = session.score(Request(traced.inputs))
                if traced.labels is not None and traced.labels.shape != scores.shape:
                    raise UsageError(
                        f"the trace's request {number}: labels have shape {list(traced.labels.shape)}, expected "
                        f"{list(scores.shape)}, targets and tasks"
                    )
                yield scores

    def states(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Mapping[str, Array]]:
        """The user state of each request, by tensor.

        Raises:
            UsageError: as `scores`.
        """
        with self._session(bundle.path) as session:
            encoder, door = session.loaded_engines()[0], Door(bundle.manifest)
            wanted = [s.name for s in bundle.manifest.graphs["user_encoder"].inputs]
            for number, traced in enumerate(requests):
                with _of_request(number):
                    history = door.admit(
                        {n: traced.inputs[n] for n in door.names("user") if n in traced.inputs}, "user"
                    )
                yield encoder.run({n: history[n] for n in wanted})

    def watched(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Mapping[str, Array]]:
        """All that both halves give, of each request, by name; see `stca.calibration.quantized_bundle.write_watched`.

        Raises:
            UsageError: as `scores`.
        """
        with self._session(bundle.path) as session:
            encoder, scorer = session.loaded_engines()
            door = Door(bundle.manifest)
            for number, traced in enumerate(requests):
                with _of_request(number):
                    given = door.admit(dict(traced.inputs), "user", "request", "target")
                made = encoder.run({s.name: given[s.name] for s in bundle.manifest.graphs["user_encoder"].inputs})
                names = [s.name for s in bundle.manifest.graphs["target_scorer"].inputs]
                yield {**made, **scorer.run({n: made[n] if n in made else given[n] for n in names})}

    def _session(self, path: Path) -> Session:
        return Session.load(path, engine="graphs", threads=self._threads, cache_bytes=0)


def tasks_of(manifest: Manifest) -> tuple[str, ...]:
    """What each column of the scores is; the reference model's tasks by their own names."""
    named = manifest.model.get("config", {}).get("tasks") if manifest.model["kind"] == "stca" else None
    return tuple(named) if named else column_names(manifest)


def speed(bundles: Mapping[str, Bundle], traced: Traced, threads: int | None, seconds: float) -> dict[str, Any]:
    """Hits and misses of one request on several bundles, in turn.

    Args:
        bundles: by name.
        traced: the request.
        threads: of one request; None takes every processor.
        seconds: for each figure.

    Returns:
        By bundle and stage: medians in milliseconds, and quartiles of the ratio to the first bundle's time in the same
        turn; the machine, and the request's sizes.
    """
    request = Request(traced.inputs, user="speed", version=0)
    runs: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as opened:
        for name, bundle in bundles.items():
            session = opened.enter_context(Session.load(bundle.path, engine="graphs", threads=threads))

            def miss(session: Session = session) -> None:
                session.forget("speed")
                session.score(request)

            runs[f"{name} miss"] = miss
            runs[f"{name} hit"] = functools.partial(session.score, request)
        times = measure_in_turn(runs, seconds)
    what, first = ("hit", "miss"), next(iter(bundles))
    stages = {n: {w: float(np.median(times[f"{n} {w}"])) * 1e3 for w in what} for n in bundles}
    ratios = {
        n: {w: np.percentile(times[f"{n} {w}"] / times[f"{first} {w}"], [25, 50, 75]).tolist() for w in what}
        for n in bundles
    }
    sizes = {n: list(x.shape) for n, x in traced.inputs.items()}
    return {"stages": stages, "ratios": ratios, "machine": machine(threads), "inputs": sizes}
