"""How far one stage's scores may be from the reference's, and how far they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from stca.arrays import Array, best_kept
from stca.errors import ParityError

TOP_K: Final = 10


@dataclass(frozen=True)
class Tolerance:
    """How far from the reference a stage may be: twice the yardstick's own error, plus a rounding floor.

    The yardstick is PyTorch in the same precision. Where a stage fails by that, it is the larger of PyTorch's error and
    that of `stca.checks.plain_sums`, which grows with what the model sums.
    """

    yardstick: float
    floor: float

    @classmethod
    def of(cls, yardstick_error: float, reference: Sequence[Array], eps: float) -> Tolerance:
        """The floor is four roundings of the largest reference value.

        Args:
            yardstick_error: largest absolute error of PyTorch's own scores in that precision.
            reference: scores in float64, an array for each request.
            eps: the precision's distance from 1 to the next number.
        """
        largest = max((float(np.abs(r).max()) for r in reference if r.size), default=0.0)
        return cls(yardstick_error, 4 * eps * largest)

    @property
    def limit(self) -> float:
        """Largest absolute error allowed."""
        return 2 * self.yardstick + self.floor


@dataclass(frozen=True)
class StageParity:
    """One stage against another: over all probes, the worst error, the cosine, and what a user feels of it.

    `topk_overlap` is the share of the reference's ten best targets, per request and task, that are among the stage's
    ten best; a target whose reference score is within the limit of the tenth counts as one of them.
    """

    name: str
    against: str
    max_abs: float
    max_rel: float
    cosine: float
    topk_overlap: float
    limit: float | None
    passed: bool


def judged(
    outcomes: Sequence[tuple[str, list[Array]]],
    against: str,
    reference: Sequence[Array],
    sizes: Sequence[Sequence[int]],
    precision: str,
    plain: float = 0.0,
) -> list[StageParity]:
    """Each stage's scores, the yardstick's first, against the reference's; `plain` as in `plain_error`."""
    eps = float(np.finfo(np.dtype(precision)).eps)
    tolerance: Tolerance | None = None
    results: list[StageParity] = []
    for name, values in outcomes:
        results.append(compare(name, against, values, reference, sizes, eps, tolerance))
        tolerance = tolerance or Tolerance.of(max(results[0].max_abs, plain), reference, eps)
    return results


def compare(
    name: str,
    against: str,
    values: Sequence[Array],
    reference: Sequence[Array],
    sizes: Sequence[Sequence[int]],
    eps: float,
    tolerance: Tolerance | None,
) -> StageParity:
    """One stage's scores against the reference's, over all probes.

    The yardstick itself, which comes without a tolerance, must keep half of its precision's digits: one that lost more
    would excuse too much in the stages after it.

    Raises:
        ParityError: when the stage gives more or fewer scores than the reference.
    """
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in xs]) for xs in (values, reference))
    if a.size != b.size:
        raise ParityError(
            f"stage {name} gives {a.size} scores, {against} gives {b.size}: they read the model in different ways; "
            "express it in other operators"
        )
    finite = bool(np.isfinite(a).all())
    error = np.abs(a - b)
    max_abs = float(error.max(initial=0.0)) if finite else float("inf")
    max_rel = float((error / np.maximum(np.abs(b), 1e-30)).max(initial=0.0)) if finite else float("inf")
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norm if norm > 0 else 1.0
    limit = tolerance.limit if tolerance else float(np.sqrt(eps) * np.abs(b).max(initial=0.0))
    # Two scores closer than twice the error may change places: sure scores round to equal ones.
    overlap = _topk_overlap(values, reference, sizes, limit if tolerance else 2 * max_abs)
    passed = finite and max_abs <= limit and overlap == 1.0
    return StageParity(name, against, max_abs, max_rel, cosine, overlap, limit, passed)


def _topk_overlap(
    values: Sequence[Array], reference: Sequence[Array], sizes: Sequence[Sequence[int]], tie: float
) -> float:
    found = wanted = 0
    for got, true, targets in zip(values, reference, sizes, strict=True):
        if got.ndim < 1 or len(got) != sum(targets):
            continue  # outputs that are not per target have no ranking
        for start, m in zip(np.cumsum([0, *targets]), targets, strict=False):
            for task in range(got.reshape(len(got), -1).shape[1]):
                g, t = (x.reshape(len(x), -1)[start : start + m, task] for x in (got, true))
                k = min(TOP_K, m)
                found += best_kept(t, g, k, tie=tie)
                wanted += k
    return found / wanted if wanted else 1.0
