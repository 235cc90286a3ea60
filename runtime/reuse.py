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
        self._last, self._size = np.zeros(followed, np.int64), np.zeros(followed)  # floats, for a fast product
        self._tick = 0
        self._hits = np.zeros(pages + 1)
        self._asked = self._stood_for = 0.0

    def _followed(self, keys: Array) -> Array:
        spread = keys.astype(np.uint64) * _SPREAD >> _BITS
        return keys[spread < np.uint64(self._limit)]

    def ask(self, keys: Array, size: int) -> None:
        """Different keys, `(n,)` int64, are asked for; what each stands for takes `size` bytes."""
        self._asked += len(keys)
        for key in self._followed(keys).tolist():
            self._tick += 1
            share = self._limit / (1 << 32)
            self._stood_for += 1 / share
            if (slot := self._slots.get(key)) is not None:
                between = float(self._size @ (self._last > self._last[slot])) / share + size
                if (pages := -int(-between // self._page_bytes)) < len(self._hits):
                    self._hits[pages] += 1 / share
            else:
                slot = self._slots[key] = self._place()
            self._last[slot], self._size[slot] = self._tick, size

    def _place(self) -> int:
        """A free slot; where there is none, fewer keys are followed from now on."""
        while not self._free:
            self._limit //= 2
            kept = set(self._followed(np.fromiter(self._slots, np.int64, len(self._slots))).tolist())
            for key in [k for k in self._slots if k not in kept]:
                slot = self._slots.pop(key)
                self._last[slot] = self._size[slot] = 0
                self._free.append(slot)
        return self._free.pop()

    def hits(self, memory: float) -> Array:
        """Hits with so many pages, `(pages + 1,)`: in the past, of which `memory` is what counts from here on."""
        hits = np.cumsum(self._hits)
        # A few keys are asked for so often that with or without them the sample is not like the rest. These hit always.
        hits[1:] += self._asked - self._stood_for
        self._hits *= memory
        self._asked, self._stood_for = self._asked * memory, self._stood_for * memory
        found: Array = np.maximum.accumulate(np.maximum(hits, 0.0))
        return found
