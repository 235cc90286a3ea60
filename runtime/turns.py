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
        self._places, self._waiting = places, 0
        # One entry for each call that computes. A list, because it grows and shrinks without a lock: every score does.
        self._running: list[None] = []
        self._free = threading.Condition(threading.Lock())

    def enter(self) -> None:
        """A score begins to compute; it waits for nobody."""
        self._running.append(None)

    def leave(self) -> None:
        """Whoever entered is done."""
        self._running.pop()
        if self._waiting:  # who begins to wait from now on sees that this call is gone
            with self._free:
                self._free.notify()

    def enter_when_free(self, deadline: Deadline) -> None:
        """Begin to compute what nobody waits for yet, once fewer than `places` calls compute.

        Raises:
            CancelledError, DeadlineError: when that does not come soon enough.
        """
        with self._free:
            self._waiting += 1
            try:
                deadline.wait(self._free.wait, lambda: len(self._running) < self._places)
            finally:
                self._waiting -= 1
            self._running.append(None)
