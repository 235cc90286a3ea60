"""User states: what they are, what they take, and what makes two of them interchangeable."""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, NamedTuple

import numpy as np

from stca.arrays import Array
from stca.errors import RequestError
from stca.runtime.cuda_device import DeviceArray, join_on_device
from stca.runtime.room import Room


class StateKey(NamedTuple):
    """What makes two states interchangeable: the user, their history's version, the weights and the state's format."""

    user: Hashable
    version: Hashable
    weights: str
    format: str


# Tells of bundles and counts, never of users or what they send.
LOG = logging.getLogger("stca.runtime")

# A state's tensors may stay where the encoder's engine computes; those are cut, joined and counted like numpy's.
StateArray = Array | DeviceArray


def join(parts: Sequence[StateArray]) -> StateArray:
    """Rows of all parts, one part after the other, where they are."""
    on_host = [x for x in parts if isinstance(x, np.ndarray)]
    return np.concatenate(on_host) if on_host else join_on_device([x for x in parts if isinstance(x, DeviceArray)])


_BYTES: Final = attrgetter("nbytes")


@dataclass(eq=False, slots=True)
class UserState:
    """What the user encoder made of one user: tensors by name, and the number of history tokens in them.

    Where a session checks versions, `history` is the digest of the user's inputs; after an append there is none.
    After an append the rows of tokens lie in a `room`, and end there at row `end`. Where states hold sums, inputs of
    new events may be `waiting`: `tokens` counts them, but `tensors` are without them until a request reads the state.
    Nothing of a state changes any more once it is kept.

    Attributes:
        in_pieces: whether it is several states, each in tensors of its own as the manifest's graph for pieces takes
            them; such a state is made for one request, and not kept.
        row_bytes: of all tensors.
        nbytes: of the memory that they lie in, with what is free behind their rows and what waits.
    """

    tensors: Mapping[str, StateArray]
    tokens: int
    history: str | None = None
    room: Room | None = None
    end: int = 0
    waiting: Mapping[str, Array] | None = None
    in_pieces: bool = False
    row_bytes: int = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        room, tensors, waiting = self.room, self.tensors, self.waiting
        self.row_bytes = sum(map(_BYTES, tensors.values()))
        self.nbytes = self.row_bytes
        if room is not None:
            self.nbytes = room.nbytes + sum(x.nbytes for n, x in tensors.items() if n not in room.memory)
        if waiting is not None:
            self.nbytes += sum(map(_BYTES, waiting.values()))


# What an entry takes besides its tensors' bytes and its key's text, measured with CPython 3.11 and numpy 2: the key,
# the state, the table's slots; and each tensor's name, array object and slot.
_ENTRY_BYTES, _TENSOR_BYTES, _ROOM_BYTES = 700, 250, 500


def cost_of(key: StateKey, state: UserState) -> int:
    """Bytes that an entry really takes, its objects and its key included."""
    text = sys.getsizeof(key.user) + sys.getsizeof(key.version) + sys.getsizeof(state.history)
    for part in (key.user, key.version):
        if type(part) is tuple:
            text += sum(map(_size, part))
    room = 0 if state.room is None else _ROOM_BYTES + _TENSOR_BYTES * len(state.room.memory)
    arrays = len(state.tensors) + len(state.waiting or ())
    return state.nbytes + text + _ENTRY_BYTES + _TENSOR_BYTES * arrays + room


def _size(value: object) -> int:
    """Bytes of a key's part: of a tuple, its own parts' too."""
    return sys.getsizeof(value) + (sum(map(_size, value)) if isinstance(value, tuple) else 0)


def along(name: str, values: Array, state: UserState) -> Array:
    """An entry for each token of a state: what was sent, or one for all.

    Raises:
        RequestError: when there are others.
    """
    if len(values) not in (1, state.tokens):
        raise RequestError(
            f"{name}: has {len(values)} rows for a history of {state.tokens} tokens; send so many, or one value"
        )
    return values if len(values) == state.tokens else np.repeat(values, state.tokens, axis=0)
