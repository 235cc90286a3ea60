"""How many pages of memory would have kept what is asked for again: the hits of every size, from one sample of keys.

The number of bytes asked for since a key was asked for last is the least cache, least recently used out first, in which
it is a hit. Only keys whose hash is small are followed, and stand for the others (SHARDS, Waldspurger et al., FAST
2015); the more keys there are, the smaller a hash must be.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from stca.arrays import Array

# Spreads keys over 32 bits: an odd number near 2^64 divided by the golden ratio.
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_BITS: Final = np.uint64(32)
# Keys that are told of together.
_TOGETHER: Final = 256


class Reuse:
    """Not safe to share between threads.

    Args:
        page_bytes: of a page.
        pages: most that are thought of.
        followed: most keys that are followed at a time.
    """

    def __init__(self, page_bytes: int, pages: int, followed: int = 2048) -> None:
        self._page_bytes, self._limit = max(1, page_bytes), 1 << 32
        self._slots: dict[int, int] = {}
        self._free = list(range(followed))
        self._last, self._size = np.zeros(followed, np.int64), np.zeros(followed)
        self._tick = 0
        self._hits = np.zeros(pages + 1)
        self._asked = self._stood_for = 0.0

    def _followed(self, keys: Array) -> Array:
        spread = keys.astype(np.uint64) * _SPREAD >> _BITS
        return keys[spread < np.uint64(self._limit)]

    def ask(self, keys: Array, size: int) -> None:
        """Different keys, `(n,)` int64, are asked for; what each stands for takes `size` bytes."""
        self._asked += len(keys)
        followed = self._followed(keys)
        for begin in range(0, len(followed), _TOGETHER):
            self._ask(followed[begin : begin + _TOGETHER], size)

    def _ask(self, followed: Array, size: int) -> None:
        keys, slots = self._slots_of(followed)
        while np.count_nonzero(fresh := slots < 0) > len(self._free):
            self._follow_fewer()
            keys, slots = self._slots_of(followed)
        if not keys:
            return
        share = self._limit / (1 << 32)
        self._stood_for += len(keys) / share
        known = np.flatnonzero(~fresh)
        between = (self._newer(slots[known]) + size * known) / share + size
        pages = -(-between // self._page_bytes)
        np.add.at(self._hits, pages[pages < len(self._hits)].astype(np.int64), 1 / share)
        for at in np.flatnonzero(fresh).tolist():
            slots[at] = self._slots[keys[at]] = self._free.pop()
        self._last[slots], self._size[slots] = self._tick + np.arange(1, len(keys) + 1), size
        self._tick += len(keys)

    def _newer(self, slots: Array) -> Array:
        """Bytes asked for since each of these keys was, less what those before it ask for again."""
        last, order = self._last[slots], self._last.argsort()
        after = np.append(self._size[order][::-1].cumsum()[::-1], 0)
        again = np.tri(len(slots), k=-1, dtype=bool) & (last > last[:, None])
        found: Array = after[np.searchsorted(self._last[order], last, "right")] - again @ self._size[slots]
        return found

    def _slots_of(self, keys: Array) -> tuple[list[int], Array]:
        """Those of the keys that are followed, and the slot of each, -1 where it has none yet."""
        followed: list[int] = self._followed(keys).tolist()
        return followed, np.array([self._slots.get(key, -1) for key in followed], np.int64)

    def _follow_fewer(self) -> None:
        """Half as many from now on."""
        self._limit //= 2
        kept = set(self._followed(np.fromiter(self._slots, np.int64, len(self._slots))).tolist())
        for key in [k for k in self._slots if k not in kept]:
            slot = self._slots.pop(key)
            self._last[slot] = self._size[slot] = 0
            self._free.append(slot)

    def hits(self) -> Array:
        """Hits with so many pages since this was asked for last, `(pages + 1,)`."""
        hits = np.cumsum(self._hits)
        # A few keys are asked for so often that with or without them the sample is not like the rest. These hit always.
        hits[1:] += self._asked - self._stood_for
        self._hits[:] = self._asked = self._stood_for = 0.0
        found: Array = np.maximum.accumulate(np.maximum(hits, 0.0))
        return found
