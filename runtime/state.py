"""User states and where they are kept between requests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stca.runtime.cuda_device import DeviceArray, join_on_device
from stca.types import Array


@dataclass(frozen=True)
class StateKey:
    """What makes two states interchangeable: the user, their history's version, the weights and the state's format."""

    user: Hashable
    version: Hashable
    weights: str
    format: str


# A state's tensors may stay where the encoder's engine computes; those are cut, joined and counted like numpy's.
StateArray = Array | DeviceArray


def join(parts: Sequence[StateArray]) -> StateArray:
    """Rows of all parts, one part after the other, where they are."""
    on_host = [x for x in parts if isinstance(x, np.ndarray)]
    return np.concatenate(on_host) if on_host else join_on_device([x for x in parts if isinstance(x, DeviceArray)])


@dataclass(frozen=True)
class UserState:
    """What the user encoder made of one user: tensors by name, and the number of history tokens in them."""

    tensors: Mapping[str, StateArray]
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors.values())


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was made. `refused` states were larger than the whole budget."""

    hits: int
    misses: int
    evictions: int
    refused: int
    users: int
    bytes: int
    budget: int


class StateCache:
    """At most one state per user, least recently used out first, within a byte budget. Safe to share between threads.

    A state that does not fit is not kept; that never fails a request.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, tuple[StateKey, UserState]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = self._refused = 0

    def get(self, key: StateKey) -> UserState | None:
        """The state with exactly this key, or None."""
        with self._lock:
            held = self._held.get(key.user)
            if held is None or held[0] != key:
                self._misses += 1
                return None
            self._held.move_to_end(key.user)
            self._hits += 1
            return held[1]

    def put(self, key: StateKey, state: UserState, *, instead_of: UserState | None = None) -> bool:
        """Keep `state` in place of the user's last one; False when it is larger than the budget.

        With `instead_of`, only while that is still the one kept: what came or went meanwhile wins.
        """
        with self._lock:
            if instead_of is not None and (key.user not in self._held or self._held[key.user][1] is not instead_of):
                return False
            self._drop(key.user)
            if state.nbytes > self._budget:
                self._refused += 1
                return False
            while self._bytes + state.nbytes > self._budget:
                self._drop(next(iter(self._held)))
                self._evictions += 1
            self._held[key.user] = (key, state)
            self._bytes += state.nbytes
            return True

    def find(self, user: Hashable) -> tuple[StateKey, UserState] | None:
        """Whatever is kept for `user`, without counting as a hit."""
        with self._lock:
            return self._held.get(user)

    def forget(self, user: Hashable) -> bool:
        """Drop the user's state; False when there was none."""
        with self._lock:
            return self._drop(user)

    def clear(self) -> None:
        """Drop everything; the counters stay."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def stats(self) -> CacheStats:
        """Counters and sizes, taken at one moment."""
        with self._lock:
            return CacheStats(
                self._hits, self._misses, self._evictions, self._refused, len(self._held), self._bytes, self._budget
            )

    def _drop(self, user: Hashable) -> bool:
        held = self._held.pop(user, None)
        if held is not None:
            self._bytes -= held[1].nbytes
        return held is not None
