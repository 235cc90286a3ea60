"""Types that every room speaks of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Of any dtype and shape; docstrings say which.
Array: TypeAlias = NDArray[Any]
# So few values are looked at quicker one by one than by numpy, whose calls have a price of their own.
FEW: Final = 64


def all_finite(x: Array) -> bool:
    """Whether no value is NaN or infinite."""
    if x.size > FEW:
        return bool(np.isfinite(x).all())
    values = x.ravel().tolist()
    # NaN and infinity stay in a sum; one that is neither may still overflow, and then each value is looked at.
    return math.isfinite(sum(values)) or all(map(math.isfinite, values))


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
