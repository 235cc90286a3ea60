"""Rows of a table that were asked for lately, in memory beside the file: pages of rows, in a number that may change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from stca.arrays import Array
from stca.manifest import TableSpec
from stca.runtime.reuse import Reuse
from stca.tables import TableFile

# What a kept row takes besides: its id, and when it was used last.
_ROW_BYTES: Final = 16
# Spreads ids over a page's places: an odd number near 2^64 divided by the golden ratio.
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_NONE: Final = -1


class RowCache:
    """A source of rows before another. Safe to share between threads.

    An id has one place in each page. A new row takes the place, of those of its id, that was used longest ago.

    Args:
        source: the table's file.
        spec: of the table.
        page_bytes: most bytes of a page.
        most_pages: most that there may be.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        source: TableFile,
        spec: TableSpec,
        page_bytes: int,
        most_pages: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.source, self._width, self._clock = source, spec.width, clock
        self._places = max(1, page_bytes // (4 * spec.width + _ROW_BYTES))
        self._lock = threading.Lock()
        self._ids, self._used = (np.zeros((0, self._places), np.int64) for _ in range(2))
        self._rows: list[Array] = []
        self._reuse = Reuse(self._places, most_pages)
        self._tick = self._hits = self._misses = 0
        self._seconds = 0.0

    @property
    def pages(self) -> int:
        """How many pages of rows there are."""
        return len(self._rows)

    @property
    def counts(self) -> tuple[int, int]:
        """Rows that were kept when they were asked for, and rows that were not."""
        return self._hits, self._misses

    def rows(self, ids: Array) -> Array:
        """See `stca.runtime.tables.RowSource`."""
        found = np.empty((len(ids), self._width), np.float32)
        places = (ids.astype(np.uint64) * _SPREAD % np.uint64(self._places)).astype(np.int64)
        with self._lock:
            self._tick += 1
            self._reuse.ask(np.unique(ids), 1)
            missing = np.ones(len(ids), bool)
            for page, rows in enumerate(self._rows):
                here = np.flatnonzero(missing & (self._ids[page, places] == ids))
                at = places[here]
                found[here], self._used[page, at], missing[here] = rows[at], self._tick, False
            fresh, first, back = np.unique(ids[missing], return_index=True, return_inverse=True)
            at = places[missing][first]
            self._hits, self._misses = self._hits + len(ids) - int(missing.sum()), self._misses + len(fresh)
        if len(fresh):
            began = self._clock()
            read = self.source.rows(fresh)
            took = self._clock() - began
            found[missing] = read[back]
            with self._lock:
                self._seconds += took
                self._keep(fresh, at, read)
        return found

    def _keep(self, ids: Array, places: Array, rows: Array) -> None:
        """Put rows in; of several for one place, one."""
        if not self._rows:
            return
        places, one = np.unique(places, return_index=True)
        ids, rows = ids[one], rows[one]
        there = (self._ids[:, places] == ids).any(axis=0)  # another thread's look-up kept it meanwhile
        places, ids, rows = places[~there], ids[~there], rows[~there]
        oldest = self._used[:, places].argmin(axis=0)
        self._ids[oldest, places], self._used[oldest, places] = ids, self._tick
        for page in np.unique(oldest).tolist():
            self._rows[page][places[oldest == page]] = rows[oldest == page]

    def resize(self, pages: int) -> None:
        """Have so many pages; of each place, the rows that were used longest ago go first."""
        with self._lock:
            while self.pages > pages:
                self._drop_page()
            for _ in range(pages - self.pages):
                self._rows.append(np.zeros((self._places, self._width), np.float32))
                self._ids = np.concatenate([self._ids, np.full((1, self._places), _NONE)])
                self._used = np.concatenate([self._used, np.zeros((1, self._places), np.int64)])

    def _drop_page(self) -> None:
        last, oldest = self.pages - 1, self._used.argmin(axis=0)
        for page in range(last):  # what is younger on the last page moves to where the oldest was
            at = np.flatnonzero(oldest == page)
            self._ids[page, at], self._used[page, at] = self._ids[last, at], self._used[last, at]
            self._rows[page][at] = self._rows[last][at]
        self._ids, self._used = self._ids[:last].copy(), self._used[:last].copy()
        self._rows.pop()

    def saved(self, memory: float) -> Array:
        """Seconds of reading that so many pages would have saved, see `stca.runtime.memory_pool.Consumer`."""
        with self._lock:
            return self._reuse.hits(memory) * (self._seconds / max(1, self._misses))
