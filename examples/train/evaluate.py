"""AUC against history length, for anything that scores requests: the torch model, a runtime session, a formula.

AUC is *global*: over all (user, target) pairs of the evaluation at once, not averaged over users. It is the chance
that a positive pair is scored above a negative one, ties counting half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stca.calibration.quality import auc
from stca.errors import StcaError
from stca.examples.train.log import Log, LoggedRequest
from stca.examples.train.world import World, generate

ScoreFn = Callable[[Any], NDArray[Any]]
"""Maps one request's inputs (int64 ids and times, int32 offsets) to scores `[m, tasks]`; only their order matters."""

BatchFn = Callable[[LoggedRequest, int], tuple[Any, NDArray[np.float32]]]
"""Maps a request of a log and a history's length to what is scored and the targets' labels `[m, tasks]`."""

# Users no training run has seen: the generator's stream of that number.
EVALUATION_SEED = 7


@dataclass(frozen=True)
class AucRow:
    """AUC of one task at one history length, beside that of the reference scores on the same pairs."""

    history: int
    task: str
    auc: float
    references: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an AUC that does not exist is None."""
        known = {name: None if math.isnan(x) else x for name, x in {"auc": self.auc, **self.references}.items()}
        return {"history": self.history, "task": self.task, **known}


def auc_rows(
    score: ScoreFn,
    log: Log,
    lengths: Sequence[int],
    references: Callable[[LoggedRequest, int], Mapping[str, NDArray[Any]]],
    *,
    request_time: bool = False,
    batch: BatchFn | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[AucRow]:
    """AUC on the log's held-out requests with their most recent `lengths[i]` events.

    Args:
        score: what is measured.
        log: its held-out events are the targets.
        lengths: of the histories; users with fewer events have what they have.
        references: other scores `[m, tasks]` of a request at a length, by name.
        request_time: give `score` the input `request_time`.
        batch: makes a request's inputs and labels; None takes the log's own.
        progress: told what is being done.

    Returns:
        One row per length and task.

    Raises:
        StcaError: when the log holds no events out.
    """
    requests = log.held_out_requests()
    if not requests:
        raise StcaError("the log holds no events out to evaluate on; read it with a larger held-out share")
    rows = []
    for length in lengths:
        progress(f"evaluating at history {length}")
        parts: dict[str, list[NDArray[Any]]] = {}
        for request in requests:
            inputs, labels = (
                log.batch([request], [length], request_time=request_time) if batch is None else batch(request, length)
            )
            scored = {"": np.asarray(score(inputs)), "labels": labels, **references(request, length)}
            for name, values in scored.items():
                parts.setdefault(name, []).append(values)
        columns = {name: np.concatenate(values) for name, values in parts.items()}
        labels = columns.pop("labels")
        for t, task in enumerate(log.tasks):
            by_name = {name: auc(values[:, t], labels[:, t]) for name, values in columns.items()}
            rows.append(AucRow(length, task, by_name.pop(""), by_name))
    return rows


def auc_table(
    score: ScoreFn,
    lengths: Sequence[int],
    *,
    users: int = 200,
    targets: int = 512,
    world: World | None = None,
    request_time: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[AucRow]:
    """AUC on the generated log, on users no training run has seen, beside what is possible.

    References: `best`, the best possible AUC given this history; `no_history`, the best without any; `limit`, the best
    with an endless one (see `stca.examples.train.world`). The users and targets are the same at every length and in
    every call with the same `users`, `targets` and longest length.
    """
    made = generate(world or World(), users=users, history=max(lengths), targets=targets, seed=EVALUATION_SEED)

    def references(request: LoggedRequest, length: int) -> dict[str, NDArray[Any]]:
        return {
            "best": made.best_scores(request, length),
            "no_history": made.best_scores(request, 0),
            "limit": made.limit_scores(request),
        }

    return auc_rows(score, made.log, lengths, references, request_time=request_time, progress=progress)


def base_rates(log: Log, prior_events: float = 5.0) -> Callable[[LoggedRequest, int], Mapping[str, NDArray[Any]]]:
    """References for a log whose truth nobody knows, from its training events, whatever the history's length.

    `popularity`: how often the item occurs. `item_rate`: the share of positives among the item's events, drawn to the
    overall share as by `prior_events` more. `item_and_user_rate`: the same of the user added.
    """
    counts = np.diff(log.user_offsets)
    user = np.repeat(np.arange(log.users), counts)
    training = np.arange(len(user)) < np.repeat(log.held_out, counts)
    overall = log.labels[training].mean(axis=0)

    def rate(of: NDArray[np.integer[Any]], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        seen = np.bincount(of[training], minlength=size).astype(np.float64)
        positives = np.stack([np.bincount(of[training], y, size) for y in log.labels[training].T], axis=1)
        return seen, (positives + prior_events * overall) / (seen + prior_events)[:, None]

    popularity, item_rate = rate(log.item, log.items)
    _, user_rate = rate(user, log.users)

    def references(request: LoggedRequest, length: int) -> Mapping[str, NDArray[Any]]:
        item = log.item[request.cut : request.end]
        return {
            "popularity": np.repeat(popularity[item, None], len(log.tasks), axis=1),
            "item_rate": item_rate[item],
            "item_and_user_rate": item_rate[item] + user_rate[request.user],
        }

    return references


def as_text(rows: Sequence[AucRow]) -> str:
    """A table to read, one line per history length and task."""
    names = list(rows[0].references) if rows else []
    lines = [["history", "task", "AUC", *names]]
    lines += [[str(r.history), r.task, *(f"{x:.4f}" for x in (r.auc, *r.references.values()))] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
