"""Who computes when: scores at once, states made ahead only while a processor is free."""

from __future__ import annotations

import threading

from stca.runtime.deadline import Deadline


class Turns:
    """Counts calls that compute. Safe to share between threads.

    Args:
        places: how many calls compute side by side before they slow each other down.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._running = self._waiting = 0
        self._lock = threading.Lock()
        self._free = threading.Condition(self._lock)

    def enter(self) -> None:
        """A score begins to compute; it waits for nobody."""
        with self._lock:
            self._running += 1

    def leave(self) -> None:
        """Whoever entered is done."""
        with self._lock:
            self._running -= 1
            if self._waiting:
                self._free.notify()

    def enter_when_free(self, deadline: Deadline) -> None:
        """Begin to compute what nobody waits for yet, once fewer than `places` calls compute.

        Raises:
            CancelledError, DeadlineError: when that does not come soon enough.
        """
        with self._lock:
            self._waiting += 1
            try:
                deadline.wait(self._free.wait, lambda: self._running < self._places)
            finally:
                self._waiting -= 1
            self._running += 1
