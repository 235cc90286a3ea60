"""Calls that come together, computed together: packed up to a limit, after a wait that is bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from stca.runtime.deadline import NEVER, Deadline

T = TypeVar("T")
R = TypeVar("R")


class _Batch(Generic[T, R]):
    """Calls that wait for one run; `results` once it ended, None where it failed."""

    def __init__(self) -> None:
        self.items: list[T] = []
        self.cost = 0
        self.full, self.done = threading.Event(), threading.Event()
        self.results: Sequence[R] | None = None


class Batcher(Generic[T, R]):
    """Runs items of several callers together, in the thread of the first. Safe to share between threads.

    An item that would fill a batch by itself is nobody's company: it runs at once and alone, so that small ones never
    wait for a large one. Where a run of several fails, each is run alone, and fails alone.

    Args:
        run: gives a result for each item, in their order.
        most: cost of all items of a run together.
        seconds: how long the first of a batch waits for others.
    """

    def __init__(self, run: Callable[[Sequence[T], Deadline], Sequence[R]], most: int, seconds: float) -> None:
        self._run, self._most, self._seconds = run, most, seconds
        self._lock = threading.Lock()
        self._open: _Batch[T, R] | None = None

    def call(self, item: T, cost: int, deadline: Deadline) -> R:
        """The item's result.

        Raises:
            CancelledError, DeadlineError: when it is not wanted any more; others go on.
            StcaError: whatever its own run raises.
        """
        if cost >= self._most:
            return self._run([item], deadline)[0]
        with self._lock:
            batch = self._open
            first = batch is None or batch.cost + cost > self._most
            if first or batch is None:
                if batch is not None:
                    batch.full.set()
                batch = self._open = _Batch()
            place = len(batch.items)
            batch.items.append(item)
            batch.cost += cost
            if batch.cost == self._most:
                batch.full.set()
                self._open = None
        if first:
            self._lead(batch, deadline)
        else:
            deadline.wait(batch.done.wait, batch.done.is_set)
        deadline.check()
        return self._run([item], deadline)[0] if batch.results is None else batch.results[place]

    def _lead(self, batch: _Batch[T, R], deadline: Deadline) -> None:
        """Wait for company, then run the batch; whatever happens, nobody waits for it any more."""
        try:
            left = deadline.remaining()
            batch.full.wait(self._seconds if left is None else min(self._seconds, left))
            with self._lock:
                if self._open is batch:
                    self._open = None
            batch.results = self._run(batch.items, deadline if len(batch.items) == 1 else NEVER)
        except Exception:
            if len(batch.items) == 1:
                raise
        finally:
            with self._lock:
                if self._open is batch:
                    self._open = None
            batch.done.set()
