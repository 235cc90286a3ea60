"""Types that every room speaks of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Of any dtype and shape; docstrings say which.
Array: TypeAlias = NDArray[Any]


def extremes(x: Array) -> tuple[Any, Any]:
    """The least and the largest of at least one value, as Python's numbers; NaN for both where there is one.

    A request's time goes into first calls more than into values: `x.min()` and `x.max()` run Python and numpy code that
    an engine's run has driven out of the processor's caches, and take several times as long.
    """
    return x.item(x.argmin()), x.item(x.argmax())


def all_finite(x: Array) -> bool:
    """Whether no value is NaN or infinite."""
    if x.dtype.kind != "f":  # of a dtype that is not numpy's own
        return bool(np.isfinite(x).all())
    return x.size == 0 or (math.isfinite(x.item(x.argmin())) and math.isfinite(x.item(x.argmax())))


def best_kept(exact: Array, found: Array, k: int, *, tie: float = 0.0) -> int:
    """How many of the best `k` by `found` are among the best `k` by `exact`, both scores `[N]` with `N >= k`.

    What lies below the k-th of `exact` by no more than `tie` is as good as it.
    """
    if k == 0:
        return 0
    best = np.argsort(-found, kind="stable")[:k]
    return int((exact[best] >= np.sort(exact)[-k] - tie).sum())


# Told each step of long work as it starts.
Progress: TypeAlias = Callable[[str], None]


class Step(str):
    """A step of which the number is known: `done` of `total` lie behind when it starts."""

    __slots__ = ("done", "total")
    done: int
    total: int

    def __new__(cls, words: str, done: int, total: int) -> Step:
        made = super().__new__(cls, words)
        made.done, made.total = done, total
        return made
