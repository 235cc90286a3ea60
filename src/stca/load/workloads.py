"""How traffic moves between two crowds, each some users who ask for some items.

`stca load` draws its arrivals by it, and `benchmarks/memory_split.py` what it simulates. Named as in HELM (arXiv
2605.04450), whose own definitions are not public.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np

from stca.arrays import Array
from stca.errors import UsageError

STEADY, TREND, BURST = "steady", "trend", "burst"
WORKLOADS: Final = (STEADY, TREND, BURST)
# Crowds from the first to the other, in a trend.
_STEPS: Final = 49


@dataclass(frozen=True)
class Crowd:
    """Who asks for what, both by Zipf's law: the k-th one's share falls with k to a power, and 0 is all alike.

    Attributes:
        users: how many there are. zipf: their power.
        items: how many are asked for; 0 for all that the model has. items_zipf: their power.

    Raises:
        UsageError: when a number is out of its range.
    """

    users: int
    zipf: float = 1.0
    items: int = 0
    items_zipf: float = 0.0

    def __post_init__(self) -> None:
        if self.users < 1 or self.items < 0 or not (0 <= self.zipf <= 10 and 0 <= self.items_zipf <= 10):
            raise UsageError("users must be at least 1, items at least 0, and both powers (zipf) from 0 to 10")


def crowds(workload: str, first: Crowd, other: Crowd) -> list[Crowd]:
    """Both crowds; of a trend those between them, too, each with the same factor from the one before.

    Raises:
        UsageError: when a trend is to go from a number of items to all that the model has, or back.
    """
    if workload != TREND:
        return [first, other]
    if bool(first.items) != bool(other.items):
        raise UsageError("items: a trend needs their number in both crowds, or 0 in both; set --items and --towards so")
    ends = np.array([[of.users, of.items, of.zipf, of.items_zipf] for of in (first, other)], float)
    made = []
    for step in np.linspace(0, 1, _STEPS).tolist():
        users, items = np.prod(ends[:, :2] ** [[1 - step], [step]], axis=0).round().astype(int).tolist()
        zipf, items_zipf = ([1 - step, step] @ ends[:, 2:]).tolist()
        made.append(Crowd(users, zipf, items, items_zipf))
    return made


def which(workload: str, at: Array, rng: np.random.Generator) -> Array:
    """Of requests at `at`, in [0, 1) of the traffic, the number of each one's crowd.

    `steady` is either one at random, alike throughout; `trend` goes from the first to the other; `burst` is the other,
    then the first, each for a quarter, twice.
    """
    if workload == STEADY:
        return rng.integers(0, 2, len(at))
    if workload == TREND:
        return (at * _STEPS).astype(np.int64)
    return (at * 2 % 1 < 0.5).astype(np.int64)


def ranks(count: int, power: float, draws: Array) -> Array:
    """Numbers in [0, count) by Zipf's law, from draws in [0, 1)."""
    return np.searchsorted(_shares(count, power), draws, "right")


@functools.lru_cache(128)
def _shares(count: int, power: float) -> Array:
    """Of the first 1, 2, … together."""
    shares = np.cumsum(1.0 / np.arange(1, count + 1) ** power)
    found: Array = shares / shares[-1]
    return found
