"""Changes to a kept state: new events behind the old ones, or corrected ones in their place. Only they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

from numpy.typing import ArrayLike

from stca.errors import RequestError
from stca.manifest import TOKENS
from stca.runtime.client_values import mapping_of
from stca.runtime.model import Model
from stca.runtime.state import UserState
from stca.runtime.store import StateStore
from stca.runtime.turns import Turns
from stca.runtime.user_states import plain_key


class Way(NamedTuple):
    """A kind of change.

    Attributes:
        name: of the session's call.
        done: the same, as it is told.
        result: of a kept state and that of the events: the changed one, and how many bytes were written for it.
    """

    name: str
    done: str
    result: Callable[[UserState, UserState], tuple[UserState, int]]


def change(
    way: Way,
    model: Model,
    store: StateStore,
    turns: Turns,
    user: Hashable,
    events: Mapping[str, ArrayLike],
    version: Hashable,
    after: Hashable,
) -> bool:
    """Encode the events and keep the changed state; whether it is kept. `Session.append` has the arguments.

    Raises:
        RequestError: when an input is wrong, or the model's tokens depend on each other or on the request.
    """
    if user is None:
        raise RequestError(f"user: is None; events are {way.done} to the state of one user, say whose")
    if version is None:
        raise RequestError("version: is None; name the history with the new events, or no request will find it")
    if not model.manifest.appendable:
        raise RequestError(f"{model.door.why_not_appendable()}; send the whole history with a new version")
    user, version = plain_key(user, version)
    events, names = mapping_of("inputs", events), model.door.names("user")
    once = {n: model.door.placeholder(n) for n in names if model.door.inputs[n].shape[:1] != (TOKENS,)}
    if given := [n for n in events if n in once or n in model.door.names("request", "target")]:
        raise RequestError(f"{given[0]}: is no part of an event; {way.name} takes the per-token user inputs alone")
    arrays = model.door.admit({**once, **events}, "user")
    follows = plain_key(None, after)[1]
    held = store.find(user, model.key(user, version), *([] if after is None else [model.key(user, follows)]))
    if held is None or (held[0].weights, held[0].format) != (model.manifest.weights, model.format):
        return False
    if held[0].version == version:
        return True  # the same call again, after a timeout perhaps: its events are in
    if after is not None and held[0].version != follows:
        return False
    turns.enter()
    try:
        state, written = way.result(held[1], model.encode([arrays])[0])
    finally:
        turns.leave()
    kept = store.put(model.key(user, version), state, instead_of=held[1])
    if kept:
        store.count_made(appended_bytes=written)
    return kept
