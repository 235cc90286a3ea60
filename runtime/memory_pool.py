"""One budget of memory for user states and rows of tables, whose split follows the load.

After HELM (arXiv 2605.04450), whose policy is learnt; here it is a rule. Taken from there: a split is committed when
its pages have moved, so that whoever asks for it sees what is so; and what fails falls back to the last committed one.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from stca.arrays import Array
from stca.errors import told
from stca.runtime.cache import StateCache
from stca.runtime.lately import BETTER, Lately, best_split
from stca.runtime.options import POOL_PAGES
from stca.runtime.state import LOG
from stca.runtime.store import StateStore

# What user states are called beside the tables.
STATES: Final = "states"
# From one decision to the next.
_SECONDS: Final = 0.25


class Consumer(Protocol):
    """What takes pages of a pool.

    Attributes:
        pages: how many it has.
    """

    @property
    def pages(self) -> int: ...

    def resize(self, pages: int) -> None:
        """Have so many; raises MemoryError where there is no memory for more."""
        ...

    def saved(self) -> Array:
        """Seconds of work that 0, 1, … pages would have saved since this was asked for last, `(all pages + 1,)`; below
        0 where they cost more than they save.
        """
        ...


class SplitPolicy(Protocol):
    """Decides who has how many pages."""

    def wanted(self, pages: Mapping[str, int], saved: Mapping[str, Array]) -> Mapping[str, int]:
        """The pages that each should have, of as many together as there are.

        Args:
            pages: that each has, by name: `states` or a table's.
            saved: seconds that 0, 1, … pages would have saved each since the load changed last (`stca.runtime.lately`);
                below 0 where they cost more than they save.
        """
        ...


@dataclass(frozen=True)
class Static:
    """A fixed split.

    Attributes:
        rows: share of the pages for rows of tables, in [0, 1], alike for each table.
    """

    rows: float

    def wanted(self, pages: Mapping[str, int], saved: Mapping[str, Array]) -> Mapping[str, int]:
        """See `SplitPolicy`."""
        total, tables = sum(pages.values()), [n for n in pages if n != STATES]
        each = int(total * self.rows / len(tables)) if tables else 0
        return {n: each if n in tables else total - each * len(tables) for n in pages}


@dataclass(frozen=True)
class MarginalUtility:
    """Takes the split that would have saved most (`stca.runtime.lately.best_split`).

    Attributes:
        better: how much more a split must have saved than the present one, as a share of it, to be taken instead: a
            page that moves is empty at first.
    """

    better: float = BETTER

    def wanted(self, pages: Mapping[str, int], saved: Mapping[str, Array]) -> Mapping[str, int]:
        """See `SplitPolicy`."""
        made = best_split(pages, saved)
        before, after = (sum(float(saved[n][split[n]]) for n in pages) for split in (pages, made))
        return made if after > before + self.better * abs(before) else dict(pages)


class StatePages:
    """The user states of a pool.

    Args:
        cache: of states.
        page_bytes: of a page.
        most_pages: most that there may be.
        seconds_each: what it takes to make a state, so far.
    """

    def __init__(self, cache: StateCache, page_bytes: int, most_pages: int, seconds_each: Callable[[], float]) -> None:
        self._cache, self._page_bytes, self._seconds_each = cache, page_bytes, seconds_each
        self._pages = 0
        cache.watch(page_bytes, most_pages)

    @property
    def pages(self) -> int:
        """See `Consumer`."""
        return self._pages

    def resize(self, pages: int) -> None:
        """See `Consumer`."""
        self._cache.resize(pages * self._page_bytes)
        self._pages = pages

    def saved(self) -> Array:
        """See `Consumer`."""
        return self._cache.hits() * self._seconds_each()


class MemoryPool:
    """Pages and who has them. Safe to share between threads.

    Args:
        pages: how many there are.
        states: the consumer of user states.
        policy: decides.
        page_bytes: of a page.

    Attributes:
        split: pages by name, as they were moved last: what is, and not what is wanted.
        moves, refused: decisions that moved pages; decisions that were none, or failed, so that the split stayed.
    """

    def __init__(self, pages: int, states: Consumer, policy: SplitPolicy, page_bytes: int = 1) -> None:
        self._pages, self._policy, self._page_bytes = pages, policy, page_bytes
        self._consumers: Mapping[str, Consumer] = {STATES: states}
        self._lock, self._end = threading.Lock(), threading.Event()
        self.moves = self.refused = 0
        self.split: Mapping[str, int] = {}
        self._lately = Lately([STATES])

    @classmethod
    def of(cls, policy: SplitPolicy, budget: int, store: StateStore) -> MemoryPool:
        """The pool of a session, which decides four times a second until it is closed.

        Args:
            policy: decides.
            budget: bytes of all pages.
            store: of user states.
        """
        page_bytes = budget // POOL_PAGES
        pool = cls(POOL_PAGES, StatePages(store.memory, page_bytes, POOL_PAGES, store.seconds_each), policy, page_bytes)
        pool.start(_SECONDS)
        return pool

    def serve(self, tables: Mapping[str, Consumer]) -> None:
        """Share the pages with the rows of these tables from now on, half of them at first."""
        with self._lock:
            self._consumers = {STATES: self._consumers[STATES], **tables}
            self._lately = Lately(list(self._consumers))
            each = self._pages // (2 * len(tables)) if tables else 0
            self._move({STATES: self._pages - each * len(tables), **dict.fromkeys(tables, each)})
        self.step()

    def bytes(self) -> dict[str, int]:
        """Bytes that each has, by name."""
        return {name: pages * self._page_bytes for name, pages in self.split.items()}

    def step(self) -> None:
        """Decide once, and move pages."""
        with self._lock:
            saved = self._lately.add({n: one.saved() for n, one in self._consumers.items()}, self.split)
            try:  # a policy may be the caller's own, and do anything
                said = self._policy.wanted(dict(self.split), saved)
                wanted = {name: operator.index(pages) for name, pages in dict(said).items()}
            except Exception as e:
                self._refuse("a policy failed (%s)", told(e))
                return
            if wanted == self.split:
                return
            if wanted.keys() != self.split.keys() or min(wanted.values()) < 0 or sum(wanted.values()) > self._pages:
                self._refuse("a split of %d pages as %s was refused", self._pages, wanted)
            elif self._move(wanted, self.split):
                self.moves += 1

    def _refuse(self, why: str, *values: object) -> None:
        self.refused += 1
        LOG.warning(why + "; the split stays %s", *values, self.split)

    def _move(self, *splits: Mapping[str, int]) -> bool:
        """Move pages to the first of these splits that there is memory for, at worst all to states, which take theirs
        one by one; whether to the very first. Givers first, so that no more pages are in use than there are.
        """
        for split in (*splits, {name: self._pages * (name == STATES) for name in self._consumers}):
            try:
                for name in sorted(split, key=lambda n: split[n] - self._consumers[n].pages):
                    self._consumers[name].resize(split[name])
            except MemoryError:
                self.refused += 1
                LOG.warning("there is no memory for a split of pages as %s", split)
                continue
            self.split = split
            break
        return split is splits[0]

    def start(self, seconds: float) -> None:
        """Decide every so many seconds, in a thread, until `close`, or until nobody has this pool any more."""
        arguments = weakref.ref(self), self._end, seconds
        threading.Thread(target=_decide, args=arguments, name="stca-memory-pool", daemon=True).start()

    def close(self) -> None:
        """Decide no more."""
        self._end.set()


def _decide(of: weakref.ref[MemoryPool], end: threading.Event, seconds: float) -> None:
    while not end.wait(seconds):
        pool = of()
        if pool is None:
            return
        pool.step()
        del pool  # else it would live as long as this waits
