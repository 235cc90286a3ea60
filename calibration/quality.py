"""Did the ranking move? AUC and the best targets, against the exact scores, with how sure that is.

Requests are what is independent, not targets: a user's targets share one history. So intervals are of sums over
requests (for AUC, Obuchowski's for clustered data, Biometrics 53, 1997), at 95 %.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from stca.arrays import Array, best_kept
from stca.errors import UsageError

Verdict = Literal["holds", "broken", "undecided"]
_NORMAL_95: Final = 1.96
# With fewer requests an interval says little of itself.
LEAST_REQUESTS: Final = 8
_TOP: Final = re.compile(r"top([1-9]\d{0,3})")


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Budget:
    """How far the ranking may move.

    Attributes:
        auc: most that each task's AUC may change; None where it is not asked.
        top: the least mean share of the exact scores' best `k` targets that are among the new ones', by `k`.
    """

    auc: float | None
    top: Mapping[int, float]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Of `auc=0.0005,top10=0.99`.

        Raises:
            UsageError: naming the part that is no bound.
        """
        auc, top = None, {}
        for part in text.split(","):
            name, _, number = part.partition("=")
            try:
                bound = float(number)
            except ValueError:
                bound = -1.0
            if name == "auc" and 0 < bound < 1:
                auc = bound
            elif (found := _TOP.fullmatch(name)) and 0 < bound <= 1:
                top[int(found[1])] = bound
            else:
                raise UsageError(f"--budget: {part!r:.60} is no bound; write auc=0.0005,top10=0.99, or one of them")
        return cls(auc, top)

    def check_labels(self, labels: Iterable[Array | None]) -> None:
        """Raises UsageError when an AUC is bounded, and no request has labels."""
        if self.auc is not None and all(x is None for x in labels):
            raise UsageError("--budget: auc needs labels, and the trace has none; add labels, or bound top10 alone")


@dataclass(frozen=True)
class Measure:
    """One thing that a budget bounds.

    Attributes:
        name: `auc NAME`, the change of a task's AUC, or `top10 NAME`, the share of the best that stayed.
        estimate: of it. bound: what the budget allows. exact: the exact scores' own AUC; None of a share.
    """

    name: str
    estimate: Estimate
    bound: float
    exact: float | None = None

    def told(self, value: float) -> str:
        """A value of it for a message: a change has its sign, a share none."""
        return f"{value:.6f}" if self.exact is None else f"{value:+.6f}"

    @property
    def allows(self) -> str:
        """What the budget allows, for a message."""
        return f"at least {self.bound:g}" if self.exact is None else f"at most {self.bound:g}"

    @property
    def verdict(self) -> Verdict:
        """Whether the bound holds, surely; is broken by the estimate itself; or lies within the interval."""
        e = self.estimate
        if self.exact is None:
            return "broken" if e.value < self.bound else "undecided" if e.low < self.bound else "holds"
        if abs(e.value) > self.bound:
            return "broken"
        return "undecided" if max(abs(e.low), abs(e.high)) > self.bound else "holds"

    def requests_needed(self, requests: int) -> int:
        """About how many requests would decide it, where so many left it open."""
        room = self.bound - abs(self.estimate.value) if self.exact is not None else self.estimate.value - self.bound
        width = (self.estimate.high - self.estimate.low) / 2
        return int(min(1e9, np.ceil(requests * (width / max(room, width * 1e-3)) ** 2)))


def measure(
    exact: Sequence[Array],
    found: Sequence[Array],
    labels: Sequence[Array | None],
    tasks: Sequence[str],
    budget: Budget,
) -> list[Measure]:
    """Hold scores against a budget.

    Args:
        exact, found: scores `(targets, tasks)` of each request.
        labels: `(targets, tasks)` of each, NaN where unknown; None for none. Looked at where the budget bounds AUC.
        tasks: names of the columns.
        budget: what to measure.

    Raises:
        UsageError: when there are too few requests, or labels of one kind alone.
    """
    if len(exact) < LEAST_REQUESTS:
        raise UsageError(f"the trace has {len(exact)} requests, a budget needs at least {LEAST_REQUESTS}; record more")
    made = []
    for column, task in enumerate(tasks):
        a, b = ([np.asarray(x[:, column], np.float64) for x in scores] for scores in (exact, found))
        if budget.auc is not None:
            known = [i for i, x in enumerate(labels) if x is not None and np.isfinite(np.asarray(x)[:, column]).any()]
            if 0 < len(known) < LEAST_REQUESTS:
                raise UsageError(
                    f"{len(known)} requests of the trace have labels of task {task}, auc needs {LEAST_REQUESTS}; "
                    "add labels, or bound top10 alone"
                )
            truth = [np.asarray(labels[i])[:, column] for i in known]
            own, change = auc_change([a[i] for i in known], [b[i] for i in known], truth, task)
            made.append(Measure(f"auc {task}", change, budget.auc, own))
        for k, bound in budget.top.items():
            shares = np.array([best_kept(x, y, k) / k for x, y in zip(a, b, strict=True) if len(x) > k])
            if len(shares) < LEAST_REQUESTS:  # of k targets, all are among the best k, whatever the scores are
                raise UsageError(
                    f"{len(shares)} requests of the trace have more than {k} targets, top{k} needs {LEAST_REQUESTS}; "
                    "record more, or bound a smaller top"
                )
            made.append(Measure(f"top{k} {task}", _mean(shares), bound))
    return made


def auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve of `scores [N]` for `labels [N]` of 0 and 1; NaN when there is only one kind of label.

    The chance that a positive is above a negative, ties counting half (Mann-Whitney).
    """
    placed = _placements(scores, labels > 0)
    return float(placed[labels > 0].mean()) if 0 < (labels > 0).sum() < len(labels) else float("nan")


def auc_change(
    exact: Sequence[Array], found: Sequence[Array], labels: Sequence[Array], task: str
) -> tuple[float, Estimate]:
    """AUC of `exact`, and how it changes with `found`, over all requests' targets at once.

    Raises:
        UsageError: when the labels are not of both kinds.
    """
    if not labels:
        raise UsageError(f"no request of the trace has labels of task {task}, so there is no AUC of it")
    known = [np.isfinite(y) for y in labels]
    positive = np.concatenate([y[k] > 0 for y, k in zip(labels, known, strict=True)])
    request = np.repeat(np.arange(len(known)), [int(k.sum()) for k in known])
    a, b = (np.concatenate([x[k] for x, k in zip(s, known, strict=True)]) for s in (exact, found))
    if not positive.any() or positive.all():
        kinds = "positive" if positive.size and positive.all() else "negative"
        raise UsageError(f"the trace's labels of task {task} are all {kinds} or unknown, so there is no AUC of it")
    first, second = _placements(a, positive), _placements(b, positive)
    own = float(first[positive].mean())
    moved = second - first
    change = float(moved[positive].mean())
    # What each request adds: its positives among all negatives, and its negatives among all positives.
    part = np.zeros(len(known))
    for kind, sign in ((positive, 1.0), (~positive, -1.0)):
        np.add.at(part, request[kind], (sign * moved[kind] - change) / kind.sum())
    spread = float(np.sqrt((part**2).sum() * len(part) / max(1, len(part) - 1)))
    return own, Estimate(change, change - _NORMAL_95 * spread, change + _NORMAL_95 * spread)


def _placements(scores: Array, positive: Array) -> Array:
    """Of each value, the share of the other kind's values that lie below it, ties counting half."""
    made = np.empty(len(scores))
    for kind in (positive, ~positive):
        others = np.sort(scores[~kind])
        below, upto = (np.searchsorted(others, scores[kind], side) for side in ("left", "right"))
        made[kind] = (below + upto) / 2 / max(1, len(others))
    return made


def _mean(values: Array) -> Estimate:
    if not len(values):
        return Estimate(1.0, 1.0, 1.0)
    spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 1.0
    mean = float(values.mean())
    return Estimate(mean, mean - _NORMAL_95 * spread, min(1.0, mean + _NORMAL_95 * spread))
