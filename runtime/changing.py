"""Changes to a kept state: new events behind the old ones, or corrected ones in their place. Only they are encoded.

What follows from sums over events, the layers behind a sketch say, costs the same for one new event as for a hundred.
So new events of such states wait for the next request, or until there are many, and it is computed once for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from stca.arrays import Array
from stca.errors import RequestError
from stca.runtime.client_values import key_of, mapping_of, quoted
from stca.runtime.model import Model
from stca.runtime.room import Room
from stca.runtime.state import StateKey, UserState, join
from stca.runtime.store import StateStore
from stca.runtime.turns import Turns
from stca.specs import TOKENS

# Most events that wait: a request is to wait for little more than what follows from the sums.
_MOST_PUT_OFF: Final = 256


def change(
    model: Model,
    store: StateStore,
    turns: Turns,
    user: Hashable,
    events: Mapping[str, ArrayLike],
    version: Hashable,
    after: Hashable,
    at: int | None = None,
) -> bool:
    """Keep the state with these events, encoded or waiting; whether it is kept. `Session.append` and `amend` have the
    arguments; without `at`, events are appended.

    Raises:
        RequestError: as of these.
    """
    call = "append" if at is None else "amend"
    _check_call(call, model, user, version)
    user, version, follows = key_of("user", user), key_of("version", version), key_of("version", after)
    # What is corrected is never cut: the others would come one place early.
    arrays = _admitted(call, model, mapping_of("inputs", events), cut=at is None)
    if after is not None and follows == version:
        raise RequestError(f"version: is {quoted(version)}, that of the history before; name the changed one anew")
    key = model.key(user, version)
    while True:
        held = store.find(user, key, *([] if after is None else [model.key(user, follows)]))
        made_by = store.next_call()
        if held is None or (held.key.weights, held.key.format) != (model.manifest.weights, model.format):
            return False
        if held.key.version == version:
            return True  # the same call again, after a timeout perhaps: its events are in
        if after is not None and held.key.version != follows:
            return False
        if model.sums and model.window is not None and held.state.tokens + model.tokens(arrays) > model.window:
            return False  # the oldest events would have to leave the sums
        state, written = _changed(model, store, turns, key, held.state, arrays, at)
        if store.put(key, state, made_by, instead_of=held.state):
            store.count_made(appends=1, appended_bytes=written)
            return True
        if (now := store.memory.find(user)) is None or now.key != held.key:
            return False
        # The same history is there in another form: a request finished it, say. So once more, from what is there now.


def _changed(
    model: Model,
    store: StateStore,
    turns: Turns,
    key: StateKey,
    old: UserState,
    arrays: Mapping[str, Array],
    at: int | None,
) -> tuple[UserState, int]:
    """The old state with these events, to be kept under `key`; and how many bytes were written for it."""
    first = None if at is None else _first(old, model.tokens(arrays), at)
    blank, late = model.door.only_blank(arrays), None
    if model.sums:
        late = put_off(model, old, arrays)
        may_wait = blank is None and model.tokens(late.waiting or {}) <= _MOST_PUT_OFF
        # A file holds what outlives the process, and so no state that is still to be finished.
        if may_wait and store.file is None and store.memory.fits(key, late):
            return late, sum(x.nbytes for x in arrays.values())
    turns.enter()
    try:
        if late is not None:
            state, written = finish(model, late)
        elif first is None:
            state, written = extend(model, old, next(model.encode([arrays])))
        else:
            state, written = replace(model, old, next(model.encode([arrays])), first)
        if blank is not None and not model.gives_finite(state):
            raise RequestError(
                f"{blank.name}: with these events the history would hold nothing but {blank.blank}, for which the "
                "model has no finite score; send at least one other value"
            )
    finally:
        turns.leave()
    return state, written


def _check_call(call: str, model: Model, user: Hashable, version: Hashable) -> None:
    if user is None:
        done = {"append": "appended to", "amend": "amended in"}[call]
        raise RequestError(f"user: is None; events are {done} the state of one user, say whose")
    if version is None:
        raise RequestError("version: is None; name the history as it is then, or no request will find it")
    if not model.manifest.appendable:
        raise RequestError(f"{model.door.why_not_changeable(call)}; send the whole history with a new version")
    if model.sums and call == "amend":
        raise RequestError(
            "amend: this bundle's states are sums over all events, and what one of them gave is not known any "
            "more; send the whole history with a new version"
        )


def _admitted(call: str, model: Model, events: dict[str, ArrayLike], *, cut: bool) -> dict[str, Array]:
    """The events as the encoder takes them. With sums in the state, what follows from no event is made again, so the
    user's other inputs come along as they are now; else nothing is made of these, and any valid row will do.
    """
    door = model.door
    once = [n for n in door.names("user") if door.inputs[n].shape[:1] != (TOKENS,) and not model.sums]
    if given := [n for n in events if n in once or n in door.names("request", "target")]:
        taken = "the user inputs" if model.sums else "the per-token user inputs"
        raise RequestError(f"{given[0]}: is no part of an event; {call} takes {taken} alone")
    return door.admit({**{n: door.placeholder(n) for n in once}, **events}, "user", events=True, cut=cut)


def checked_place(at: int) -> int:
    """The place of an event, as a caller gave it.

    Raises:
        RequestError: when it is no integer.
    """
    if not isinstance(at, int | np.integer) or isinstance(at, bool):
        raise RequestError(f"at: is {quoted(at)}; the place of an event is a whole number")
    return int(at)


def _first(kept: UserState, events: int, at: int) -> int:
    """The place of the first event that is corrected, from the oldest, where `at` is negative too.

    Raises:
        RequestError: when the events are not all within the history.
    """
    first = at + kept.tokens if at < 0 else at
    if not 0 <= first <= kept.tokens - events:
        raise RequestError(
            f"at: is {at}; the kept history has {kept.tokens} events, and all {events} from there on must be in it"
        )
    return first


def put_off(model: Model, old: UserState, events: Mapping[str, Array]) -> UserState:
    """The state with these events behind those that wait already: copies, for the arrays are the caller's.

    Raises:
        RequestError: as `Model.kept_sums`, or when other sizes than the number of events differ.
    """
    model.kept_sums(old)
    waiting = {}
    for name, new in events.items():
        shape = model.door.inputs[name].shape
        if old.waiting is None or TOKENS not in shape:
            waiting[name] = np.array(new, order="C")
            continue
        first, axis = old.waiting[name], shape.index(TOKENS)
        if np.delete(first.shape, axis).tolist() != np.delete(new.shape, axis).tolist():
            raise RequestError(
                f"{name}: has shape {list(new.shape)}, and the events before have {list(first.shape)}; they must agree "
                f"in all but axis {axis}, or send the whole history with a new version"
            )
        waiting[name] = np.concatenate([first, new], axis=axis)
    return dataclasses.replace(old, tokens=old.tokens + model.tokens(events), history=None, waiting=waiting)


def finish(model: Model, state: UserState) -> tuple[UserState, int]:
    """The state with the events that waited, and how many bytes were written for it."""
    assert state.waiting is not None
    before = dataclasses.replace(state, tokens=state.tokens - model.tokens(state.waiting), waiting=None)
    return extend(model, before, model.grown(before, state.waiting))


def extend(model: Model, old: UserState, new: UserState) -> tuple[UserState, int]:
    """The state of both histories one after the other, its oldest tokens dropped beyond the window; and how many
    bytes were written for it. Where states hold sums, `new` was grown from `old`, and all but rows of tokens is its.
    """
    total = old.tokens + new.tokens
    kept = total if model.window is None else min(total, model.window)
    names = [spec.name for spec in model.manifest.state if spec.shape[:1] == (TOKENS,)]
    tensors = dict(new.tensors if model.sums else old.tensors)
    made = sum(x.nbytes for n, x in tensors.items() if n not in names) if model.sums else 0
    for spec in model.manifest.state:
        if model.is_offsets(spec):
            tensors[spec.name] = np.array([0, kept], dtype=spec.dtype)
    dropped = total - kept
    if dropped >= old.tokens or not names:  # none of the old ones is left
        fresh = {n: new.tensors[n][max(0, dropped - old.tokens) :] for n in names}
        return UserState(tensors | fresh, kept), made + sum(x.nbytes for x in fresh.values())
    rows = {n: x for n in names if isinstance(x := new.tensors[n], np.ndarray)}
    earlier = {n: x[dropped:] for n in names if isinstance(x := old.tensors[n], np.ndarray)}
    if len(rows) < len(names) or len(earlier) < len(names):
        tensors |= {n: join([old.tensors[n][dropped:], new.tensors[n]]) for n in names}
        return UserState(tensors, kept), made + sum(tensors[n].nbytes for n in names)
    room, end, written = old.room, old.end, made + sum(x.nbytes for x in rows.values())
    if room is None or not room.take(end, new.tokens):
        room, end = Room(earlier, new.tokens), kept - new.tokens
        room.take(end, new.tokens)
        written += sum(x.nbytes for x in earlier.values())
    return UserState(tensors | room.write(end, rows, kept), kept, None, room, end + new.tokens), written


def replace(model: Model, old: UserState, new: UserState, first: int) -> tuple[UserState, int]:
    """The state with `new`'s events in the place of those from `first` on, all of which it has; and how many bytes
    were written for it: all, since requests may be reading the old ones.
    """
    names = [spec.name for spec in model.manifest.state if spec.shape[:1] == (TOKENS,)]
    last = first + new.tokens
    rows = {n: join([old.tensors[n][:first], new.tensors[n], old.tensors[n][last:]]) for n in names}
    return UserState({**old.tensors, **rows}, old.tokens), sum(x.nbytes for x in rows.values())
