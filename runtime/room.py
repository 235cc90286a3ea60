"""Memory in which a user's rows grow: new ones are written behind the last, and the oldest fall off in front.

Engines on a CPU take each tensor as one piece of memory. A state is a window on such a piece, so a hit copies nothing,
and an append writes the new rows alone for as long as there is room. Rows are written once, behind all that any state
shows: a request that still scores with an older window sees the rows it began with.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

import numpy as np

from stca.arrays import Array

# Room for so many rows to come, or for a part of those that are there. When it is full, the window moves into another:
# by then an eighth of its rows were written, so a new row costs eight copied ones at most.
_LEAST_ROWS: Final = 64
_PART: Final = 8


class Room:
    """Rows of several tensors that grow together. Safe to share between threads.

    Attributes:
        memory: by the tensor's name, its rows and those to come, `(rows, …)`.
    """

    def __init__(self, rows: Mapping[str, Array], more: int) -> None:
        """Copy `rows`, as many of each tensor, into memory of their own with room for `more` and some to spare."""
        self._used = len(next(iter(rows.values())))
        size = self._used + more + max(_LEAST_ROWS, (self._used + more) // _PART)
        self.memory = {name: np.empty((size, *x.shape[1:]), x.dtype) for name, x in rows.items()}
        for name, x in rows.items():
            self.memory[name][: self._used] = x
        self._size, self._lock = size, threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for x in self.memory.values())

    def take(self, end: int, rows: int) -> bool:
        """Whether `rows` behind row `end` are the caller's to write: they are free, and nobody was faster."""
        with self._lock:
            if end != self._used or end + rows > self._size:
                return False
            self._used += rows
            return True

    def write(self, end: int, rows: Mapping[str, Array], shown: int) -> dict[str, Array]:
        """Write `rows` behind row `end`, which were taken; of each tensor the last `shown` rows, in place."""
        last = end + len(next(iter(rows.values())))
        for name, x in rows.items():
            self.memory[name][end:last] = x
        return {name: x[last - shown : last] for name, x in self.memory.items()}
