"""How long an answer is wanted: looked at before work begins and between its stages, never within an engine's run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from stca.errors import CancelledError, DeadlineError, UsageError
from stca.runtime.client_values import quoted

# How soon whoever waits for another's work sees that it was cancelled.
_LOOK_SECONDS: Final = 0.02


class Deadline:
    """Seconds from now in which an answer is of use, and a way to say earlier that it no longer is.

    Make it when the request arrives, so that waiting in a queue counts, and give it to `Session.score` or `warm`.
    `cancel` may be called from any thread.

    Args:
        seconds: how long; 0 or less is over already, None is for ever.

    Raises:
        UsageError: when `seconds` is no number.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._until = None if seconds is None else time.monotonic() + _number(seconds)
        self._cancelled = threading.Event()

    @classmethod
    def of(cls, given: float | Deadline | None) -> Deadline:
        """What a call was given as its `deadline`."""
        if given is None:
            return NEVER
        return given if isinstance(given, Deadline) else cls(given)

    def cancel(self) -> None:
        """The answer is not wanted any more: calls with this deadline end with a CancelledError, soon."""
        if self is not NEVER:
            self._cancelled.set()

    def remaining(self) -> float | None:
        """Seconds that are left, not below 0; None without a limit."""
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def check(self) -> None:
        """Raises CancelledError or DeadlineError when the answer is not wanted any more."""
        if self is NEVER:
            return
        if self._cancelled.is_set():
            raise CancelledError("the call was cancelled; what was computed for it so far is kept as a user state")
        if self._until is not None and time.monotonic() >= self._until:
            raise DeadlineError(
                "the deadline passed before the answer was there; allow more time, or send less at once"
            )

    def wait(self, wait: Callable[[float | None], object], done: Callable[[], bool]) -> None:
        """Call `wait`, of an event or a condition, until `done`.

        Raises:
            CancelledError, DeadlineError: when the answer is not wanted any more before that.
        """
        while not done():
            self.check()
            left = self.remaining()
            wait(None if self is NEVER else min(_LOOK_SECONDS, _LOOK_SECONDS if left is None else left))


NEVER: Final = Deadline()
# What a call takes: seconds from now, or one that can be cancelled.
Wanted: TypeAlias = float | Deadline | None


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"deadline: is {quoted(value)}, expected seconds from now, a Deadline or None")
    return number
