"""Where the state of a request's user comes from: it is kept, another call makes it, or this one does."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.errors import HistoryNeededError, RequestError
from stca.runtime.changing import finish
from stca.runtime.client_values import key_of, quoted
from stca.runtime.deadline import NEVER, Deadline
from stca.runtime.flights import Flights
from stca.runtime.model import Model
from stca.runtime.state import StateKey, UserState
from stca.runtime.store import JOINED, MEMORY, StateStore


class Found(NamedTuple):
    """What a look-up gave for one request.

    Attributes:
        key: what its state is kept under; None where nothing is kept.
        state: the kept one, or None.
        history: the admitted user inputs, where there is no such state; None where another call is making it.
        came: where the state was, or why it is not kept.
        call: which call asked, as the store numbers them.
    """

    key: StateKey | None
    state: UserState | None
    history: Mapping[str, Array] | None
    came: str = ""
    call: int = 0


# Types of keys that need no more looking at.
_PLAIN: Final = frozenset((str, int))


class UserStates:
    """Finds states and makes those that are missing, each once. Safe to share between threads.

    Args:
        store: where they are kept.
        check_versions: refuse a history that is sent with the version of another one that is kept.
    """

    def __init__(self, store: StateStore, *, check_versions: bool = False) -> None:
        self._store, self._check_versions = store, check_versions
        self._flights = Flights()

    def at_hand(self, model: Model, user: Hashable, version: Hashable) -> UserState | None:
        """The state that is in memory for this version of a user's history; None where there is none, or `find` is to
        say. It counts as no hit yet.
        """
        if type(user) not in _PLAIN or type(version) not in _PLAIN:
            return None
        return self._store.memory.get(StateKey(user, version, model.manifest.weights, model.format), again=True)

    def count_at_hand(self) -> None:
        """Count a hit that `at_hand` gave."""
        self._store.count_hit(MEMORY)

    def find(self, model: Model, inputs: dict[str, ArrayLike], user: Hashable, version: Hashable) -> Found:
        """The state kept for this version of a user's history, or else the history, checked.

        Raises:
            RequestError: when an input is wrong; HistoryNeededError where neither is there.
        """
        user, version = key_of("user", user), key_of("version", version)
        if user is None:
            if version is not None:
                raise RequestError(
                    f"version: is {quoted(version)} of no user; say whose history it is, or leave it out"
                )
            return Found(None, None, model.door.admit(inputs, "user"))
        if version is None:
            arrays = model.door.admit(inputs, "user")
            key = model.key(user, model.door.digest(arrays))
            held, came, call = self._store.look_up(key)
            return Found(key, held, arrays, came, call)
        key = model.key(user, version)
        held, came, call = self._store.look_up(key)
        if held is not None:
            if self._check_versions and model.door.has_user(inputs):
                self._check_version(model, key, held, model.door.admit(inputs, "user"))
            return Found(key, held, None, came, call)
        if not model.door.has_user(inputs) and model.door.names("user"):
            if not self._flights.under_way(key):
                raise _history_needed(key)
            return Found(key, None, None, came, call)
        return Found(key, None, model.door.admit(inputs, "user"), came, call)

    def _check_version(self, model: Model, key: StateKey, held: UserState, sent: Mapping[str, Array]) -> None:
        if held.history not in (None, model.door.digest(sent)):
            raise RequestError(
                f"user {quoted(key.user)}: the history sent is not the one that is kept as version "
                f"{quoted(key.version)}; give each history a version of its own"
            )

    def one(self, model: Model, found: Found, deadline: Deadline) -> tuple[UserState, bool]:
        """As `complete`, of one request."""
        if found.state is None or found.state.waiting is not None:
            (state,), (hit,) = self.complete(model, (found,), deadline)
            return state, hit
        self._store.count_hit(found.came)
        return found.state, True

    def complete(
        self, model: Model, found: Sequence[Found], deadline: Deadline
    ) -> tuple[list[UserState], tuple[bool, ...]]:
        """Of each request, the kept state or a new one, and whether there was one to be had; a user with several
        requests in the batch is encoded once.
        """
        kept = [one.state for one in found if one.state is not None]
        for one in found:
            if one.state is not None:
                self._store.count_hit(one.came)
        if len(kept) == len(found):
            return self._finished(model, found, kept, deadline), (True,) * len(found)
        states, own = self._made(model, found, deadline, self._store.count_misses)
        hits = []
        for key, held, *_ in found:
            hits.append(key is not None and (held is not None or key not in own))
            if not hits[-1]:
                own.discard(key)  # a hit for the batch's next request of this user
        if joined := sum(hits) - len(kept):
            self._store.count_hit(JOINED, joined)
        return self._finished(model, found, states, deadline), tuple(hits)

    def _finished(
        self, model: Model, found: Sequence[Found], states: list[UserState], deadline: Deadline
    ) -> list[UserState]:
        for place, (one, state) in enumerate(zip(found, states, strict=True)):
            if state.waiting is not None and one.key is not None:
                deadline.check()
                states[place] = self.finished(model, one.key, state, deadline)
        return states

    def finished(self, model: Model, key: StateKey, late: UserState, deadline: Deadline = NEVER) -> UserState:
        """A kept state with the events that waited for a request, which is kept in its place; by one call for all.
        Where that fails the kept one goes: no request for it could be answered, not even one with the history.
        """
        memory, written = self._store.memory, 0

        def whole(key: StateKey) -> UserState | None:
            state = memory.peek(key)
            return None if state is None or state.waiting is not None else state

        def grow(_: Sequence[UserState]) -> Iterator[UserState]:
            nonlocal written
            try:
                made, written = finish(model, late)
            except Exception:
                memory.discard(key, late)
                raise
            yield made

        def keep(key: StateKey, made: UserState, late: UserState) -> None:
            if self._store.put(key, made, 0, instead_of=late):
                self._store.count_made(appended_bytes=written)

        return self._flights.encode({key: late}, grow, keep, whole, deadline)[0][key]

    def make_ahead(self, model: Model, found: Found, deadline: Deadline) -> bool:
        """Make the state before a request asks for it, or finish it; whether it is kept."""
        states = [found.state] if found.state is not None else []
        if not states:
            states, _ = self._made(model, [found], deadline, lambda begun: self._store.count_made(warmed=len(begun)))
        self._finished(model, [found], states, deadline)
        return found.key is not None and self._store.memory.peek(found.key) is not None

    def _made(
        self, model: Model, found: Sequence[Found], deadline: Deadline, count: Callable[[Sequence[str]], None]
    ) -> tuple[list[UserState], set[StateKey | int]]:
        """Each one's state, and which were encoded by this call; `count` is told of encodings
        when they begin, by why there was no state."""
        missing: dict[StateKey | int, Found] = {}
        for place, one in enumerate(found):
            if one.state is None:
                missing.setdefault(place if one.key is None else one.key, one)

        def encode(those: Sequence[Found]) -> Iterator[UserState]:
            histories, came = [], []
            for one in those:
                if one.history is None:  # another call was making it, and failed
                    raise _history_needed(one.key)
                histories.append(one.history)
                if one.key is not None:
                    came.append(one.came)
            count(came)
            began = time.perf_counter()
            for state in model.encode(histories, deadline):
                self._store.count_encoded(time.perf_counter() - began)
                yield state
                began = time.perf_counter()

        def keep(key: StateKey, state: UserState, of: Found) -> None:
            if self._check_versions and of.history is not None:
                state.history = model.door.digest(of.history)
            self._store.put(key, state, of.call)

        fresh, own = self._flights.encode(missing, encode, keep, self._store.memory.peek, deadline)
        return [held or fresh[place if key is None else key] for place, (key, held, *_) in enumerate(found)], own

    def forget(self, user: Hashable) -> bool:
        """Drop the user's state, and let no encoding of it that is under way be kept; False when there was neither."""
        return self._flights.forget(user, self._store.forget)


def _history_needed(key: StateKey | None) -> HistoryNeededError:
    assert key is not None  # who is nobody sends all there is
    return HistoryNeededError(
        f"user {quoted(key.user)}: no state of version {quoted(key.version)} is kept; send the user inputs"
    )
