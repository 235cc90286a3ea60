"""Encodings under way: one for each state, whoever asks for it, and none kept that was forgotten meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

from stca.runtime.deadline import NEVER, Deadline
from stca.runtime.state import StateKey, UserState

T = TypeVar("T")


# How soon whoever waits sees that the call it waits for is gone without a word.
_LOOK_SECONDS: Final = 1.0


class _Call:
    """A call that encodes; lives as long as it runs."""


class _Flight:
    """One encoding: `state` when it has landed, None when it failed; `keep` until its user is forgotten."""

    __slots__ = ("_call", "_told", "keep", "landed", "state")

    def __init__(self, call: _Call) -> None:
        self._call = weakref.ref(call)
        self._told: threading.Event | None = None  # made for those who wait: mostly nobody does
        self.state: UserState | None = None
        self.landed, self.keep = False, True

    def over(self) -> bool:
        """Whether it has landed, or never will: an interrupt can end a call between any two steps, even its last."""
        return self.landed or self._call() is None

    def awaited(self) -> None:
        """Somebody is going to `wait`. With the lock of all flights, as `land`."""
        if self._told is None:
            self._told = threading.Event()

    def wait(self, seconds: float | None) -> None:
        """Wait until it has landed, and no longer than it takes to see that it won't."""
        assert self._told is not None
        self._told.wait(_LOOK_SECONDS if seconds is None else seconds)

    def land(self, state: UserState | None) -> None:
        """It is over."""
        self.state, self.landed = state, True
        if self._told is not None:
            self._told.set()


class Flights:
    """Encodings that run now, by the key of the state they make. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[StateKey, _Flight] = {}

    def under_way(self, key: StateKey) -> bool:
        """Whether a state of this key is being made."""
        with self._lock:
            return (flight := self._under_way.get(key)) is not None and not flight.over()

    def encode(
        self,
        missing: Mapping[StateKey | int, T],
        encode: Callable[[Sequence[T]], Iterable[UserState]],
        keep: Callable[[StateKey, UserState, T], object],
        find: Callable[[StateKey], UserState | None] = lambda _: None,
        deadline: Deadline = NEVER,
    ) -> tuple[dict[StateKey | int, UserState], set[StateKey | int]]:
        """The states of `missing`, and which of them this call made: each is encoded once, by the first who asks, and
        the others wait for it. Where that one fails, for want of memory perhaps, it is the next one's turn.

        Args:
            missing: what to encode, by the key of the state; by any number where it is nobody's, and no one else's.
            encode: makes states of several, in their order; those that it gave before it failed are kept.
            keep: told of each new state whose user was not forgotten meanwhile, and what it was made of.
            find: the state, where it was kept since the caller looked.
            deadline: how long to wait for others.
        """
        made: dict[StateKey | int, UserState] = {}
        own: set[StateKey | int] = set()
        call = _Call()
        while len(made) < len(missing):
            others: dict[StateKey, _Flight] = {}
            mine: dict[StateKey | int, _Flight | None] = {}
            try:  # before the first flight begins: whatever interrupts this call, nobody waits for ever
                with self._lock:
                    for key in missing:
                        if key in made:
                            continue
                        if isinstance(key, int):
                            mine[key] = None
                        elif (flight := self._under_way.get(key)) is not None and not flight.over():
                            others[key] = flight
                            flight.awaited()
                        elif (state := find(key)) is not None:
                            made[key] = state
                        else:
                            mine[key] = self._under_way[key] = _Flight(call)
                if mine:
                    own.update(mine)
                    for key, state in zip(mine, encode([missing[key] for key in mine]), strict=True):
                        made[key] = state
            finally:
                if mine:
                    self._land(mine, made, missing, keep)
            for key, flight in others.items():
                deadline.wait(flight.wait, flight.over)
                if flight.state is not None:
                    made[key] = flight.state
        return made, own

    def _land(
        self,
        mine: Mapping[StateKey | int, _Flight | None],
        made: Mapping[StateKey | int, UserState],
        missing: Mapping[StateKey | int, T],
        keep: Callable[[StateKey, UserState, T], object],
    ) -> None:
        """End the flights that are not yet, and keep what they made of users who were not forgotten meanwhile."""
        with self._lock:
            for key, flight in mine.items():
                if flight is None or flight.landed or isinstance(key, int):
                    continue
                state = made.get(key)
                if self._under_way.get(key) is flight:
                    del self._under_way[key]
                if state is not None and flight.keep:
                    keep(key, state, missing[key])
                flight.land(state)

    def forget(self, user: Hashable, drop: Callable[[Hashable], bool]) -> bool:
        """Let no encoding of `user` that is under way be kept or joined, and drop what is; whether anything was."""
        with self._lock:
            flights = [key for key in self._under_way if key.user == user]
            for key in flights:
                self._under_way.pop(key).keep = False
            return drop(user) or bool(flights)
