"""States in memory: at most one a user, within a budget, and why one that is asked for is not there."""

from __future__ import annotations

import array
import itertools
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from stca.arrays import Array
from stca.runtime.reuse import Reuse
from stca.runtime.state import LOG, StateKey, UserState, cost_of

# When an entry expires takes so much besides the entry, measured as in `state.py`.
_AGE_BYTES: Final = 150
# Why a state is not kept, as counters name it. What went is remembered of the users who went last.
NEW, VERSION, EXPIRED, EVICTED, WEIGHTS, TOO_LARGE = REASONS = (
    "new_user",
    "version",
    "expired",
    "evicted",
    "weights",
    "too_large",
)


class Kept(NamedTuple):
    """A kept state.

    Attributes:
        key, state: of it.
        bytes: what it costs.
        born: when it was made, on the cache's clock.
        call: which call made it, as `StateCache.calls` numbers them.
    """

    key: StateKey
    state: UserState
    bytes: int
    born: float
    call: int


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds and did since it was made.

    Attributes:
        evictions: states that went for want of room.
        refused: states that were larger than the whole budget, or no user's may be kept.
        expired: states that became older than they may.
        users: whose states are kept.
        bytes: all that this takes, objects and names included.
        budget: most of `bytes`.
        state_bytes: of the states' own rows.
        room_bytes: of the tensors' memory, room for rows to come included.
    """

    evictions: int
    refused: int
    expired: int
    users: int
    bytes: int
    budget: int
    state_bytes: int
    room_bytes: int


class StateCache:
    """At most one state per user, least recently used out first, within a byte budget. Safe to share between threads.

    A state that does not fit is not kept; that never fails a request. States that are too old go with the next call,
    whichever it is. Versions are labels without an order, so the order of calls decides what is newer: a state is not
    put in the place of one that a later call made, however long its own took.
    """

    def __init__(
        self,
        budget: int,
        *,
        max_users: int | None = None,
        ttl_seconds: float | None = None,
        cost: Callable[[StateKey, UserState], int] = cost_of,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep states within `budget` bytes.

        Args:
            budget: most bytes of all entries, by `cost`.
            max_users: most entries; None for as many as fit.
            ttl_seconds: how long a state is kept after it was put; None for ever.
            cost: real bytes of an entry.
            clock: seconds that only grow.
        """
        self._budget, self._max_users, self._ttl, self._cost = budget, max_users, ttl_seconds, cost
        self._clock, self._lock = clock, threading.Lock()
        self._held: OrderedDict[Hashable, Kept] = OrderedDict()
        self._until: OrderedDict[Hashable, float] = OrderedDict()  # who was put first comes first
        self._kind: tuple[str, str] | None = None
        self._gone = Gone()
        self._reuse: Reuse | None = None
        self._last_cost = 1
        self._closed = False
        self._bytes = self._state_bytes = self._room_bytes = 0
        self._evictions = self._refused = self._expired = 0
        self.calls = itertools.count(1)  # a call that may make a state takes its number before it looks for one

    def serve(self, weights: str, format: str) -> None:
        """Keep states of this kind from now on, and drop those of any other: after a swap they are in the way."""
        with self._lock:
            if self._kind not in (None, (weights, format)):
                for user in self._held:
                    self._gone.note(user, WEIGHTS)
                self._clear()
            self._kind = weights, format

    def get(self, key: StateKey, *, again: bool = False) -> UserState | None:
        """The state with exactly this key, or None; with `again`, whoever does not find it asks once more, and counts
        as a use then.
        """
        user = key.user
        with self._lock:
            if self._until:
                self._expire(user)
            held = self._held.get(user)
            there = held is not None and held.key == key
            if self._reuse is not None and (there or not again):
                self._ask(self._reuse, user, held)
            if held is None or not there:
                return None
            self._held.move_to_end(user)
            return held.state

    def peek(self, key: StateKey) -> UserState | None:
        """As `get`, but it counts as no use: for whoever looks again on behalf of a request that has asked already."""
        with self._lock:
            if self._until:
                self._expire(key.user)
            held = self._held.get(key.user)
            return held.state if held is not None and held.key == key else None

    def why_not(self, key: StateKey) -> str:
        """Of a key whose state is not kept, why: one of `REASONS`, as far as it is remembered."""
        with self._lock:
            if (held := self._held.get(key.user)) is None:
                return self._gone.why(key.user)
            return VERSION if (held.key.weights, held.key.format) == (key.weights, key.format) else WEIGHTS

    def put(
        self,
        key: StateKey,
        state: UserState,
        *,
        call: int | None = None,
        instead_of: UserState | None = None,
        age: float = 0,
    ) -> bool:
        """Keep `state` in place of the user's last one; False when that was made by a later call, or this one is larger
        than the budget, or of another kind than is served.

        Args:
            key: user, versions and format of the state.
            state: whose arrays nobody changes any more.
            call: the number that the call took which made it; None for one that comes now.
            instead_of: keep it only while this one is still kept: what came or went meanwhile wins.
            age: seconds since the state was made.
        """
        call = next(self.calls) if call is None else call
        cost = self._whole_cost(key, state)
        with self._lock:
            if self._until:
                self._expire(key.user)
            if self._closed or self._kind not in (None, (key.weights, key.format)):
                return False
            held = self._held.get(key.user)
            if instead_of is not None:
                if held is None or held.state is not instead_of:
                    return False
            elif held is not None and held.call >= call:
                return False
            fits = cost <= self._budget and self._max_users != 0
            # The same history in another form is as old, and keeps its place among those that expire.
            same = instead_of is not None and held is not None and held.key == key
            self._drop(key.user, aged=same and fits)
            self._last_cost = cost
            if not fits:
                self._refused += 1
                self._gone.note(key.user, TOO_LARGE)
                return False
            evicted = self._make_room(cost)
            born = self._clock() - age
            if same and held is not None:
                born, call = held.born, held.call
            self._held[key.user] = Kept(key, state, cost, born, call)
            if self._ttl is not None:
                self._until[key.user] = born + self._ttl
            self._bytes += cost
            self._state_bytes += state.row_bytes
            self._room_bytes += state.nbytes
            users = len(self._held)
        if evicted:  # a log's handlers may take their time, or ask for statistics
            LOG.debug("evicted %d states; %d are kept", evicted, users)
        return True

    def _whole_cost(self, key: StateKey, state: UserState) -> int:
        return self._cost(key, state) + (0 if self._ttl is None else _AGE_BYTES)

    def fits(self, key: StateKey, state: UserState) -> bool:
        """Whether the whole budget is enough for this state."""
        cost = self._whole_cost(key, state)
        with self._lock:
            return cost <= self._budget

    def discard(self, key: StateKey, state: UserState) -> None:
        """Drop this state, where it is still the one kept under `key`."""
        with self._lock:
            held = self._held.get(key.user)
            if held is not None and held.key == key and held.state is state:
                self._drop(key.user)

    def _make_room(self, cost: int, users: int = 1) -> int:
        """Drop the least recently used until there is room for `users` more; how many."""
        most, before = self._max_users or sys.maxsize, self._evictions
        while self._bytes + cost > self._budget or len(self._held) + users > most:
            user = next(iter(self._held))
            self._drop(user)
            self._gone.note(user, EVICTED)
            self._evictions += 1
        return self._evictions - before

    def resize(self, budget: int) -> None:
        """Keep states within so many bytes from now on; the least recently used go where there are more."""
        with self._lock:
            self._budget = budget
            self._make_room(0, users=0)

    def watch(self, page_bytes: int, pages: int) -> None:
        """Follow who is asked for, for `hits`.

        Args:
            page_bytes: of a page.
            pages: most that are thought of.
        """
        with self._lock:
            self._reuse = Reuse(page_bytes, pages)

    def hits(self) -> Array:
        """Look-ups that so many pages would have made hits, as `Reuse.hits`; of a cache that is watched."""
        with self._lock:
            assert self._reuse is not None
            return self._reuse.hits()

    def _ask(self, reuse: Reuse, user: Hashable, held: Kept | None) -> None:
        """A state that is not there is thought to be as large as the others."""
        cost = held.bytes if held is not None else self._bytes // max(1, len(self._held))
        reuse.ask(np.array([hash(user)], np.int64), cost or self._last_cost)

    def find(self, user: Hashable) -> Kept | None:
        """Whatever is kept for `user`, without counting as a use."""
        with self._lock:
            self._expire(user)
            return self._held.get(user)

    def fetch(self, user: Hashable) -> tuple[Kept, float] | None:
        """The same, with the seconds since it was made."""
        kept = self.find(user)
        return None if kept is None else (kept, max(0.0, self._clock() - kept.born))

    def forget(self, user: Hashable) -> bool:
        """Drop the user's state, and that there ever was one; False when there was none."""
        with self._lock:
            self._expire(user)
            self._gone.forget(user)
            return self._drop(user)

    def close(self) -> None:
        """Drop everything and keep nothing any more, not even what is being encoded."""
        with self._lock:
            self._closed = True
            self._clear()

    def _clear(self) -> None:
        self._held.clear()
        self._until.clear()
        self._bytes = self._state_bytes = self._room_bytes = 0

    def stats(self) -> CacheStats:
        """Counters and sizes, taken at one moment."""
        with self._lock:
            self._expire()
            return CacheStats(
                self._evictions,
                self._refused,
                self._expired,
                len(self._held),
                self._bytes,
                self._budget,
                self._state_bytes,
                self._room_bytes,
            )

    def _expire(self, asked: Hashable = None) -> None:
        """Drop the states that are too old; of `asked`, whenever it was put: one from a file was made before that."""
        if not self._until:
            return
        now = self._clock()
        if (until := self._until.get(asked)) is not None and until <= now:
            self._drop_old(asked)
        while self._until and self._until[user := next(iter(self._until))] <= now:
            self._drop_old(user)

    def _drop_old(self, user: Hashable) -> None:
        self._expired += 1
        self._gone.note(user, EXPIRED)
        self._drop(user)

    def _drop(self, user: Hashable, *, aged: bool = False) -> bool:
        """With `aged`, the user keeps the place among those that expire."""
        held = self._held.pop(user, None)
        if not aged:
            self._until.pop(user, None)
        if held is not None:
            self._bytes -= held.bytes
            self._state_bytes -= held.state.row_bytes
            self._room_bytes -= held.state.nbytes
        return held is not None


class Gone:
    """Why the users who went last have no state. A table of one size: whoever shares a place with a later one is
    taken for new, and of those who are here a hash is kept and no name.
    """

    _PLACES: Final = 1 << 13
    _HASH_BITS: Final = 56

    def __init__(self) -> None:
        self._table = array.array("Q", bytes(8 * self._PLACES))

    def note(self, user: Hashable, reason: str) -> None:
        """Remember why the user's state went."""
        place, mark = self._of(user)
        self._table[place] = REASONS.index(reason) << self._HASH_BITS | mark

    def why(self, user: Hashable) -> str:
        """The reason noted last, `NEW` where there is none."""
        place, mark = self._of(user)
        found = self._table[place]
        return REASONS[found >> self._HASH_BITS] if found & ((1 << self._HASH_BITS) - 1) == mark else NEW

    def forget(self, user: Hashable) -> None:
        """The user was never here."""
        place, mark = self._of(user)
        if self._table[place] & ((1 << self._HASH_BITS) - 1) == mark:
            self._table[place] = 0

    def _of(self, user: Hashable) -> tuple[int, int]:
        number = hash(("stca", user)) & ((1 << 63) - 1)
        return number % self._PLACES, (number >> 7) & ((1 << self._HASH_BITS) - 1)
