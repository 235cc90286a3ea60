"""Calls that come together, computed together: those who find no processor free wait as one batch for the next."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from stca.runtime.deadline import NEVER, Deadline

T = TypeVar("T")
R = TypeVar("R")
# The cost of an item that is to run by itself.
ALONE: Final = 1 << 62


class Runs(NamedTuple):
    """How often so many were computed together, and how long that took in all."""

    times: int = 0
    seconds: float = 0.0


class _Batch(Generic[T, R]):
    """Calls that wait for one run; `results` by place once it ended, empty where it failed."""

    def __init__(self, lock: threading.Lock, ready_at: float) -> None:
        self.items: dict[int, T] = {}
        self.results: dict[int, R] = {}
        self.cost, self.come, self.ready_at = 0, 0, ready_at
        self.full = self.taken = self.done = False
        self.changed = threading.Condition(lock)


class _Lane(Generic[T, R]):
    """Batches in the order in which they run, and how many run now."""

    def __init__(self) -> None:
        self.waiting: deque[_Batch[T, R]] = deque()
        self.running = 0

    def stir(self) -> None:
        """Let the first batch look whether it may begin."""
        if self.waiting:
            self.waiting[0].changed.notify()


class Batcher(Generic[T, R]):
    """Runs items of several callers together, in the thread of one of them. Safe to share between threads.

    An item that finds a place free runs at once; those that do not are gathered, and run together when one is. An item
    that would fill a batch by itself runs alone, and large ones have places of their own: so no small one waits for a
    large one, and where both compute, the operating system shares out the processors. Where a run of several fails,
    each is run alone, and fails alone.

    Args:
        run: gives a result for each item, in their order.
        most: cost of all items of a run together.
        seconds: how long the first of a batch waits for others although a place is free.
        places: how many runs of small items there are at a time, and as many of large ones.
    """

    def __init__(
        self, run: Callable[[Sequence[T], Deadline], Sequence[R]], most: int, seconds: float, places: int
    ) -> None:
        self._run, self._most, self._seconds, self._places = run, most, seconds, places
        self._lock = threading.Lock()
        self._small: _Lane[T, R] = _Lane()
        self._large: _Lane[T, R] = _Lane()
        self._runs: dict[int, Runs] = {}

    def runs(self) -> dict[int, Runs]:
        """The runs that ended, by how many items each had."""
        with self._lock:
            return dict(sorted(self._runs.items()))

    def call(self, item: T, cost: int, deadline: Deadline) -> R:
        """The item's result.

        Raises:
            CancelledError, DeadlineError: when it is not wanted any more; others go on.
            StcaError: whatever its own run raises.
        """
        lane = self._large if cost >= self._most else self._small
        with self._lock:
            batch, place = self._joined(lane, item, cost)
            try:
                self._await(lane, batch, deadline)
            except BaseException:
                self._leave(lane, batch, place, cost)
                raise
            if leads := not batch.done:
                batch.taken = True
                lane.waiting.popleft()
                lane.running += 1
                lane.stir()  # there may be another place
        if leads:
            self._lead(lane, batch, deadline)
        deadline.check()
        return batch.results[place] if batch.results else self._run([item], deadline)[0]

    def _joined(self, lane: _Lane[T, R], item: T, cost: int) -> tuple[_Batch[T, R], int]:
        """The batch that the item waits in, the last one if it has room, and its place there."""
        batch = lane.waiting[-1] if lane.waiting else None
        if batch is None or batch.full or batch.cost + cost > self._most:
            if batch is not None:
                batch.full = True
                lane.stir()
            batch = _Batch(self._lock, time.monotonic() + (self._seconds if cost < self._most else 0.0))
            lane.waiting.append(batch)
        place, batch.come = batch.come, batch.come + 1
        batch.items[place] = item
        batch.cost += cost
        if batch.cost >= self._most:
            batch.full = True
            lane.stir()
        return batch, place

    def _await(self, lane: _Lane[T, R], batch: _Batch[T, R], deadline: Deadline) -> None:
        """Wait until the batch is done, or is this caller's to run."""

        def over() -> bool:
            return batch.done or (
                not batch.taken
                and lane.waiting[0] is batch
                and lane.running < self._places
                and (batch.full or time.monotonic() >= batch.ready_at)
            )

        def wait(seconds: float | None) -> None:
            left = batch.ready_at - time.monotonic()
            if left > 0:
                seconds = left if seconds is None else min(seconds, left)
            batch.changed.wait(seconds)

        deadline.wait(wait, over)

    def _leave(self, lane: _Lane[T, R], batch: _Batch[T, R], place: int, cost: int) -> None:
        """Take out an item that nobody wants any more, where its run has not begun."""
        if batch.taken:
            return
        del batch.items[place]
        batch.cost -= cost
        if not batch.items:
            lane.waiting.remove(batch)
        lane.stir()  # whoever was told to look may be the one who leaves

    def _lead(self, lane: _Lane[T, R], batch: _Batch[T, R], deadline: Deadline) -> None:
        """Run the batch; whatever happens, nobody waits for it any more."""
        began = time.monotonic()
        try:
            results = self._run(list(batch.items.values()), deadline if len(batch.items) == 1 else NEVER)
            batch.results = dict(zip(batch.items, results, strict=True))
        except Exception:
            if len(batch.items) == 1:
                raise
        finally:
            with self._lock:
                before = self._runs.get(len(batch.items), Runs())
                self._runs[len(batch.items)] = Runs(before.times + 1, before.seconds + time.monotonic() - began)
                lane.running -= 1
                batch.done = True
                batch.changed.notify_all()
                lane.stir()
