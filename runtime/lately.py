"""What pages would have saved lately: since the load changed last, where that shows, else in many decisions' time.

Much of the past tells chance from what is so, and little of it follows a change at once. So all is remembered until
the newest part contradicts it, as by a window that adapts (ADWIN, Bifet and Gavaldà, SDM 2007).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Final

import numpy as np

from stca.arrays import Array

# A split is better where it saves so much more, as a share of what is saved.
BETTER: Final = 0.02
# Decisions that are remembered; and those before a change that tell what chance does.
_MOST, _BEFORE = 256, 32
# Decisions of a newest part.
_NEWEST: Final = (1, 2, 4)
# Standard deviations that are no chance: of rare hits that save much, many at once are no rarity.
_BEYOND_CHANCE: Final = 8.0


def best_split(pages: Mapping[str, int], saved: Mapping[str, Array]) -> dict[str, int]:
    """The split that would have saved most: pages go one after the other to whom each would have saved most. Where a
    few save nothing by themselves and many do, they go together, by what they save each.

    Args:
        pages, saved: see `stca.runtime.memory_pool.SplitPolicy`.
    """
    left, made = sum(pages.values()), dict.fromkeys(pages, 0)
    curves = {name: curve.tolist() for name, curve in saved.items()}
    rises = {name: _rises(curve[: left + 1]) for name, curve in curves.items()}
    while left:
        name = max(rises, key=lambda n: rises[n][-1][0] if rises[n] else 0.0)
        each, count = rises[name].pop() if rises[name] else (0.0, 0)
        if each <= 0:  # more pages would have saved nobody anything
            break
        if count > left:
            rises[name] = _rises(curves[name][made[name] : made[name] + left + 1])
            continue
        made[name], left = made[name] + count, left - count
    if left:  # to whom they cost least: of those alike, to whom would lose most
        costs = {n: float(saved[n][made[n]] - saved[n][made[n] + left]) for n in pages}
        made[min(pages, key=lambda n: (costs[n], made[n] - pages[n]))] += left
    return made


def _rises(curve: list[float]) -> list[tuple[float, int]]:
    """How much each page saves and how many go together, of the least concave curve above this one; the last first."""
    corners = [0]
    for n, at in enumerate(curve[1:], 1):
        while len(corners) > 1:
            before, last = corners[-2:]
            if (curve[last] - curve[before]) * (n - last) >= (at - curve[last]) * (last - before):
                break
            corners.pop()
        corners.append(n)
    return [((curve[b] - curve[a]) / (b - a), b - a) for a, b in itertools.pairwise(corners)][::-1]


class Lately:
    """Not safe to share between threads.

    Args:
        names: of those who have pages.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._parts = np.zeros((0, len(names), 0))
        self._gains = np.zeros((0, len(_NEWEST)))

    def add(self, saved: Mapping[str, Array], pages: Mapping[str, int]) -> dict[str, Array]:
        """Seconds that so many pages would have saved each lately, by name.

        Args:
            saved: the same since the last decision.
            pages: that each has.
        """
        part = np.stack([saved[name] for name in self._names])
        if part.any() or not len(self._parts):  # a time without requests tells nothing
            self._parts = np.concatenate([self._parts.reshape(-1, *part.shape), part[None]])[-_MOST:]
            wholly = best_split(pages, self._sum(self._parts))
            gains = [self._gain(newest, wholly, pages) for newest in _NEWEST]
            self._gains = np.concatenate([self._gains, [[gain for gain, _ in gains]]])[-_MOST:]
            for newest, (gain, little), before in zip(_NEWEST, gains, self._gains.T, strict=True):
                before = before[:-newest]
                if len(before) >= _BEFORE and gain > max(little, before.mean() + _BEYOND_CHANCE * before.std(ddof=1)):
                    self._parts, self._gains = self._parts[-newest:], self._gains[-newest:]
                    break
        return self._sum(self._parts)

    def _sum(self, parts: Array) -> dict[str, Array]:
        return dict(zip(self._names, parts.sum(axis=0), strict=True))

    def _gain(self, newest: int, wholly: Mapping[str, int], pages: Mapping[str, int]) -> tuple[float, float]:
        """What the split that is best in the newest decisions gains there on `wholly`, best in all; and a little.

        Chosen and judged on the same ones, it gains by chance, too: by the square root of how much is asked for. What
        it gains is therefore told by that, and compared with what newest parts gained before.
        """
        part = self._sum(self._parts[-newest:])
        best, usual = (
            sum(float(part[n][split[n]]) for n in self._names) for split in (best_split(pages, part), wholly)
        )
        if best <= 0:
            return 0.0, 0.0
        by = max(usual, BETTER * best) ** 0.5  # after a change, what was best may save nothing
        return (best - usual) / by, BETTER * abs(usual) / by
