"""The state store: where states are kept, under which keys, and what it did."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from stca.runtime.cache import EVICTED, NEW, VERSION, Kept, StateCache
from stca.runtime.file_tier import FileStats, FileTier
from stca.runtime.state import StateKey, UserState

# Where a hit's state came from: kept in memory or in a file, or made for another call at that moment.
MEMORY: Final = "memory"
FILE: Final = "file"
JOINED: Final = "joined"
# Why a state is not kept, besides what a cache tells: its record was torn or changed.
DAMAGED: Final = "damaged"


@dataclass(frozen=True)
class StoreStats:
    """What the store holds and did since it was made.

    Attributes:
        hits: requests of a user whose state was kept, or was being made already.
        misses: encodings of a user's whole history for a request, failed ones included.
        evictions: states that went for want of room.
        refused: states that were larger than the whole budget.
        users: whose states are kept in memory.
        bytes: all the memory that they take, objects and names included.
        budget: most of `bytes`.
        state_bytes: of the states' own rows.
        room_bytes: of the tensors' memory, with the room that appends left for rows to come.
        expired: states that became older than they may.
        warmed: states made ahead of a request.
        appends: histories that grew, or were corrected (`Session.amend`), without being encoded again.
        appended_bytes: what these wrote: inputs that wait, new rows, those that moved into a larger room, what follows
            from sums once it is computed, and all rows of a corrected history.
        hits_from: hits by where the state was: `memory`, `file`, or `joined` where another call was making it.
        misses_for: misses by why there was no state: `new_user`, `version` (one of another version is kept), `expired`,
            `evicted`, `weights` (a swap), `too_large` for the budget, `damaged` in its file; as far as it is known.
        file: the folder of states, where there is one; the counters above are of memory.
    """

    hits: int
    misses: int
    evictions: int
    refused: int
    users: int
    bytes: int
    budget: int
    state_bytes: int
    room_bytes: int
    expired: int
    warmed: int
    appends: int
    appended_bytes: int
    hits_from: Mapping[str, int]
    misses_for: Mapping[str, int]
    file: FileStats | None = None


@dataclass(frozen=True)
class Residence:
    """Where a user's state is.

    Attributes:
        tier: `memory` or `file`.
        bytes: what it takes there.
        version: of its history. Files hold a digest of it: there it is the one that was asked for, or None.
    """

    tier: str
    bytes: int
    version: Hashable = None


# A state and where it was, or None and why it is not kept; and the number of the call that asked, for what it makes.
LookedUp: TypeAlias = tuple[UserState | None, str, int]


class StateStore:
    """Keeps states by user, history version, weights and format. Safe to share between threads.

    Args:
        memory: the states that are at hand.
        file: those that outlive memory; None for none.
    """

    def __init__(self, memory: StateCache, file: FileTier | None = None) -> None:
        self.memory, self.file = memory, file
        self._lock = threading.Lock()
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._warmed = self._appends = self._appended_bytes = self._encoded = 0
        self._encode_seconds = 0.0
        self.next_call = memory.calls.__next__

    @classmethod
    def of(
        cls,
        budget: int,
        *,
        max_users: int | None = None,
        ttl_seconds: float | None = None,
        folder: Path | None = None,
        folder_bytes: int = 0,
    ) -> StateStore:
        """A store of memory and, where `folder` is given, files in it.

        Args:
            budget: most bytes of memory.
            max_users: most users in memory.
            ttl_seconds: how long a state is kept after it was made, wherever it is.
            folder: of the files.
            folder_bytes: most bytes of them.

        Raises:
            UsageError: when the folder cannot be used.
        """
        memory = StateCache(budget, max_users=max_users, ttl_seconds=ttl_seconds)
        if folder is None:
            return cls(memory)
        return cls(memory, FileTier(folder, folder_bytes, memory.fetch, ttl_seconds=ttl_seconds))

    def serve(self, weights: str, format: str) -> None:
        """Keep states of this kind from now on, and drop those of any other."""
        self.memory.serve(weights, format)
        if self.file is not None:
            self.file.serve(weights, format)

    def look_up(self, key: StateKey) -> LookedUp:
        """The state with exactly this key."""
        call = self.next_call()  # before it looks: what it does not see was made by a later one
        state = self.memory.get(key)
        return (state, MEMORY, call) if state is not None else (*self._beyond_memory(key), call)

    def _beyond_memory(self, key: StateKey) -> tuple[UserState | None, str]:
        why = self.memory.why_not(key)
        if self.file is None:
            return None, why
        state, damaged = self.file.read(key, self.memory.put)
        if state is not None:
            return state, FILE
        other = why in (NEW, EVICTED) and self.file.bytes_of(key.user) is not None
        return None, DAMAGED if damaged else VERSION if other else why

    def find(self, user: Hashable, *wanted: StateKey) -> Kept | None:
        """Whatever is kept of `user` in memory, or else in a file under one of the keys `wanted`, for an append."""
        held = self.memory.find(user)
        if held is None and self.file is not None:
            any(self._beyond_memory(key)[0] is not None for key in wanted)  # the first that is there is put in memory
            held = self.memory.find(user)
        return held

    def residence(self, user: Hashable, version: Hashable = None) -> Residence | None:
        """As `Session.residence`."""
        held = self.memory.find(user)
        if held is not None and version in (None, held.key.version):
            return Residence(MEMORY, held.bytes, held.key.version)
        on_file = None if self.file is None else self.file.bytes_of(user, version)
        return None if on_file is None else Residence(FILE, on_file, version)

    def put(self, key: StateKey, state: UserState, call: int, *, instead_of: UserState | None = None) -> bool:
        """As `StateCache.put`."""
        kept = self.memory.put(key, state, call=call, instead_of=instead_of)
        if kept and self.file is not None:
            self.file.offer(key.user)
        return kept

    def forget(self, user: Hashable) -> bool:
        """Drop all that is kept of a user, wherever; False when there was nothing."""
        if self.file is None:
            return self.memory.forget(user)
        try:
            on_file = self.file.forget(user)
        finally:
            in_memory = self.memory.forget(user)
        self.file.forget(user)  # what was being written of it in between
        return on_file or in_memory

    def close(self) -> None:
        """Write what waits to be written, drop everything in memory and keep nothing any more."""
        if self.file is not None:
            self.file.close()
        self.memory.close()

    def count_hit(self, came: str, requests: int = 1) -> None:
        """Count requests of users by where their state was."""
        with self._lock:
            self._hits[came] += requests

    def count_misses(self, came: Sequence[str]) -> None:
        """Count encodings for requests of users by why there was no state."""
        with self._lock:
            for why in came:
                self._misses[why] += 1

    def count_made(self, *, warmed: int = 0, appends: int = 0, appended_bytes: int = 0) -> None:
        """Count states made ahead, appends and amendments, and what these wrote."""
        with self._lock:
            self._warmed += warmed
            self._appends += appends
            self._appended_bytes += appended_bytes

    def count_encoded(self, seconds: float) -> None:
        """Count a state that was encoded, and the time that it took."""
        with self._lock:
            self._encoded += 1
            self._encode_seconds += seconds

    def seconds_each(self) -> float:
        """What it took on average to encode a state."""
        with self._lock:
            return self._encode_seconds / max(1, self._encoded)

    def stats(self) -> StoreStats:
        """Counters and sizes."""
        memory = self.memory.stats()
        with self._lock:
            return StoreStats(
                hits=self._hits.total(),
                misses=self._misses.total(),
                evictions=memory.evictions,
                refused=memory.refused,
                users=memory.users,
                bytes=memory.bytes,
                budget=memory.budget,
                state_bytes=memory.state_bytes,
                room_bytes=memory.room_bytes,
                expired=memory.expired,
                warmed=self._warmed,
                appends=self._appends,
                appended_bytes=self._appended_bytes,
                hits_from=dict(self._hits),
                misses_for=dict(self._misses),
                file=None if self.file is None else self.file.stats(),
            )
