"""Rows of a table that were asked for lately, in memory beside the file: pages of rows, in a number that may change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from stca.arrays import Array
from stca.runtime.reuse import Reuse
from stca.specs import TableSpec
from stca.tables import TableFile

# What a kept row takes besides, at most: its id, and when it was used last.
_ROW_BYTES: Final = 16
# Spreads ids over a page's places: an odd number near 2^64 divided by the golden ratio.
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_BITS: Final = np.uint64(32)
_NONE: Final = -1
# Places that are looked at together: many, for numpy's sake, and few, for what that takes besides.
_TOGETHER: Final = 1024
# How much of what rows took still counts at the next decision.
_REMEMBERED: Final = 0.9


class RowCache:
    """A source of rows before another. Safe to share between threads.

    An id has one place in each page. A new row takes the place, of those of its id, that was used longest ago.

    Args:
        source: the table's file.
        spec: of the table.
        page_bytes: most bytes of a page.
        most_pages: most that there may be.
        clock: seconds that only grow.

    Attributes:
        places: rows that a page has room for; where there is none, nothing is kept.
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
        self.places = page_bytes // (4 * spec.width + _ROW_BYTES)
        self._lock = threading.Lock()
        # Ids by place, so that all that may be an id's lie side by side: `(places, pages)`.
        self._ids = np.zeros((self.places, 0), np.int32 if spec.rows <= 1 << 31 else np.int64)
        self._used = np.zeros((self.places, 0), np.int64)
        self._rows = np.zeros((0, self.places, spec.width), np.float32)
        self._reuse = Reuse(self.places, most_pages)
        self._tick = self._hits = self._misses = 0
        self._read, self._found = _Pace(), _Pace()

    @property
    def pages(self) -> int:
        """How many pages of rows there are."""
        return self._ids.shape[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Rows that were kept when they were asked for, and rows that were not."""
        return self._hits, self._misses

    def rows(self, ids: Array) -> Array:
        """See `stca.runtime.tables.RowSource`."""
        if not self.places:
            return self.source.rows(ids)
        places = self._places_of(ids)
        with self._lock:
            self._tick += 1
            self._reuse.ask(_different(ids), 1)
            found, there = self._look_up(ids, places)
            if there.all():
                self._hits += len(ids)
                return found
            missing = ~there
            fresh, back = np.unique(ids[missing], return_inverse=True)
            self._hits, self._misses = self._hits + int(there.sum()), self._misses + len(fresh)
        began = self._clock()
        read = self.source.rows(fresh)
        took = self._clock() - began
        found[missing] = read[back]
        with self._lock:
            self._read.add(took, len(fresh))
            self._keep(fresh, self._places_of(fresh), read)
        return found

    def _places_of(self, ids: Array) -> Array:
        # By the upper bits: of the lower ones, only so many differ as the places' number and the factor allow.
        return ((ids.astype(np.uint64) * _SPREAD >> _BITS) * np.uint64(self.places) >> _BITS).astype(np.int64)

    def _look_up(self, ids: Array, places: Array) -> tuple[Array, Array]:
        """Rows `(n, width)`, and which of them were there; the others are of any numbers."""
        found, there = np.empty((len(ids), self._width), np.float32), np.zeros(len(ids), bool)
        if not self.pages:
            return found, there
        began, rows = self._clock(), self._rows.reshape(-1, self._width)
        for begin in range(0, len(ids), _TOGETHER):
            some = slice(begin, begin + _TOGETHER)
            match = self._ids.take(at := places[some], axis=0) == ids[some, None].astype(self._ids.dtype)
            page = match.argmax(axis=1)
            hit = there[some] = match[np.arange(len(at)), page]
            rows.take(page * self.places + at, axis=0, out=found[some], mode="clip")  # other modes copy twice
            self._used[at[hit], page[hit]] = self._tick
        self._found.add(self._clock() - began, len(ids))
        return found, there

    def _keep(self, ids: Array, places: Array, rows: Array) -> None:
        """Put rows in; of several for one place, one."""
        if not self.pages:
            return
        places, one = np.unique(places, return_index=True)
        fresh = (self._ids[places] != ids[one, None]).all(axis=1)  # else another thread's look-up kept it meanwhile
        places, one = places[fresh], one[fresh]
        oldest = self._used[places].argmin(axis=1)
        self._ids[places, oldest], self._used[places, oldest] = ids[one], self._tick
        self._rows[oldest, places] = rows[one]

    def resize(self, pages: int) -> None:
        """Have so many pages; of each place, the rows that were used longest ago go first.

        Raises:
            MemoryError: where there is no memory for more; the pages are those from before.
        """
        ids, used = np.full((self.places, pages), _NONE, self._ids.dtype), np.zeros((self.places, pages), np.int64)
        try:
            for more in range(self.pages + 1, pages + 1):  # one at a time, for those who look up meanwhile
                with self._lock:
                    self._have(more)
        except MemoryError:
            with self._lock:
                self._have(self.pages)
            raise
        with self._lock:
            if pages < self.pages:
                self._move_before(pages)
                self._have(pages)
            kept = min(pages, self.pages)
            ids[:, :kept], used[:, :kept] = self._ids[:, :kept], self._used[:, :kept]
            self._ids, self._used = ids, used

    def _have(self, pages: int) -> None:
        """In place: a copy would take what all pages take once more. Nobody has a view of them without the lock."""
        self._rows.resize((pages, self.places, self._width), refcheck=False)

    def _move_before(self, pages: int) -> None:
        """Move the rows of each place that were used last to the first pages."""
        for begin in range(0, self.places, _TOGETHER):
            ids, used = self._ids[begin : begin + _TOGETHER], self._used[begin : begin + _TOGETHER]
            stays = np.zeros(used.shape, bool)
            np.put_along_axis(stays, used.argsort(axis=1)[:, self.pages - pages :], True, axis=1)
            # A place has as many rows to move as there are gaps for them, and both come place by place.
            at, gap = np.nonzero(~stays[:, :pages])
            last = np.nonzero(stays[:, pages:])[1] + pages
            self._rows[gap, begin + at] = self._rows[last, begin + at]
            ids[at, gap], used[at, gap] = ids[at, last], used[at, last]
        self._ids[:, pages:], self._used[:, pages:] = _NONE, 0

    def saved(self) -> Array:
        """Seconds that so many pages would have saved, see `stca.runtime.memory_pool.Consumer`: what it took to read
        rows, less what it took to find them here. Below 0 where the source is the faster one.
        """
        with self._lock:
            saved: Array = self._reuse.hits() * (self._read.one_more() - self._found.each())
            self._read.forget()
            self._found.forget()
            return saved


class _Pace:
    """What rows took lately, from calls for some of them."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def add(self, seconds: float, rows: int) -> None:
        self._sums += (1, rows, seconds, rows * rows, rows * seconds)

    def forget(self) -> None:
        """Some of it, but never the last calls: where all rows are kept none is read for long."""
        if self._sums[0] > 1:
            self._sums *= _REMEMBERED

    def each(self) -> float:
        """Seconds of a row; 0 where there was none."""
        _, rows, seconds, _, _ = self._sums.tolist()
        return seconds / rows if rows else 0.0

    def one_more(self) -> float:
        """Seconds of a row more in a call, by least squares: a call takes its time for few rows, too."""
        calls, rows, seconds, squares, products = self._sums.tolist()
        spread = calls * squares - rows * rows
        if spread <= 1e-6 * rows * rows:  # they were all for about as many
            return self.each()
        return min(self.each(), max(0.0, (calls * products - rows * seconds) / spread))


def _different(ids: Array) -> Array:
    """Each once, in order. `np.unique` takes ten times as long for a few thousand."""
    ids = np.sort(ids)
    found: Array = ids[np.concatenate([ids[:1] == ids[:1], ids[1:] != ids[:-1]])]
    return found
