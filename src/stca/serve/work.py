"""What the server computes at once: a bounded number of requests, each on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from stca.errors import CancelledError, DeadlineError, StcaError
from stca.runtime import Deadline
from stca.serve.errors import OverloadedError, UnavailableError

T = TypeVar("T")
# How far back the mean time between two ends of jobs reaches, in seconds of work.
_MEAN_SECONDS: Final = 5.0
# Threads on which jobs wait to be gathered. A run takes no more than a few; a longer queue waits before the threads.
_MOST_THREADS: Final = 256


class Call:
    """One request, from its arrival on; `deadline` tells how long it is of use, and whether anyone still waits."""

    def __init__(self, seconds: float | None = None) -> None:
        self.arrived = self.begun = time.monotonic()
        self.deadline, self._cancelled = Deadline(seconds), False

    def expire_in(self, seconds: float | None) -> None:
        """The deadline that the request itself brings, counted from its arrival."""
        left, known = None if seconds is None else self.arrived + seconds - time.monotonic(), self.deadline.remaining()
        if left is not None and (known is None or left < known):
            self.deadline = Deadline(left)
            if self._cancelled:
                self.deadline.cancel()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._cancelled = True
        self.deadline.cancel()


class Ticket:
    """A place among the admitted requests, given back once."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self.handed_over = False

    def release(self) -> None:
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            give_back()


class Work:
    """Admits requests and computes them on threads. All but the jobs themselves runs on the event loop.

    Args:
        workers: requests computed at a time.
        queue: requests that may wait besides, those whose bodies still arrive among them.
        gathered: let those that wait do so in their jobs, where sessions gather them and say how many compute.
    """

    def __init__(self, workers: int, queue: int, *, gathered: bool = False) -> None:
        self.limit = workers + queue
        self._workers = workers
        self.admitted_now = self.refused_early = 0
        self.open = self._closed = False
        # Jobs that did not end, since when so many; and of late, seconds of all workers and the ends of jobs in them.
        self._jobs, self._since, self._worked, self._ends = 0, 0.0, 0.0, 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        threads = max(workers, min(self.limit, _MOST_THREADS)) if gathered else workers
        self._pool = ThreadPoolExecutor(threads, "stca-score")

    @property
    def wait(self) -> float:
        """Seconds until a request that comes now is computed, as far as can be told: the mean time between two ends of
        jobs while all workers are busy, for each request that is here; 0 while a worker is free.
        """
        return self.admitted_now * self._between if self.admitted_now >= self._workers else 0.0

    @property
    def _between(self) -> float:
        return self._worked / max(1.0, self._ends) if self._ends else 0.0

    def refusal(self, seconds: float | None) -> StcaError | None:
        """Why a request that comes now is not computed, of what is known without a look at it; None where it may be.
        Those refused for their deadlines are counted.

        Args:
            seconds: in which its answer is of use; None for any time.

        Returns:
            UnavailableError: when the server is not ready, or ends.
            DeadlineError: when no time is left.
            OverloadedError: when all places are taken, or the wait and a job, as long as they are in the mean, take
                longer than `seconds`.
        """
        if not self.open:
            return UnavailableError("the server takes no requests now: it loads its bundles, or ends; try another one")
        if seconds is not None and seconds <= 0:
            return DeadlineError("the deadline passed before the request came; allow more time")
        wait, full = self.wait, self.admitted_now >= self.limit
        answered = wait + self._workers * self._between if wait else 0.0
        if not full and (seconds is None or seconds >= answered):
            return None
        told = "" if full else f"; one more would take {answered:.2g} s, and the deadline is in {seconds:.2g} s"
        error = OverloadedError(f"{self.admitted_now} requests are being computed or wait{told}; try again later")
        error.retry_after = max(1, math.ceil(wait))
        self.refused_early += not full
        return error

    @contextlib.contextmanager
    def admitted(self, call: Call) -> Iterator[Ticket]:
        """A place for one request, until its job ends.

        Raises:
            UnavailableError, DeadlineError, OverloadedError: as `refusal` has them.
        """
        if (error := self.refusal(call.deadline.remaining())) is not None:
            raise error
        self.admitted_now += 1
        self._idle.clear()
        ticket = Ticket(self._leave)
        try:
            yield ticket
        finally:
            if not ticket.handed_over:
                ticket.release()

    async def run(self, ticket: Ticket, call: Call, job: Callable[[], T], gone: Coroutine[Any, Any, None] | None) -> T:
        """Compute `job` on a thread.

        A client that goes away takes a waiting job with it; one that runs ends at its next look at the call's deadline.

        Args:
            ticket: the request's place, kept until the job ends.
            call: told when nobody waits any more.
            job: what to compute.
            gone: ends when the client has gone away; None where that cancels the caller.

        Raises:
            CancelledError: when the client has gone away.
            Exception: whatever the job raises.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            if gone is not None:
                gone.close()
            raise UnavailableError("the server ends; try another one")
        submitted = self._pool.submit(_begun, call, job)
        ticket.handed_over = True
        self._pass_time()
        self._jobs += 1
        submitted.add_done_callback(lambda ended: loop.call_soon_threadsafe(self._ended, ticket, _is_of_use(ended)))
        future = asyncio.wrap_future(submitted)
        watch = None if gone is None else asyncio.ensure_future(gone)
        try:
            await asyncio.wait([f for f in (future, watch) if f is not None], return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise CancelledError("the client went away")
            return future.result()
        finally:
            if watch is not None:
                watch.cancel()
            if not future.done():
                call.cancel()
                future.cancel()

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing is computed any more; False when that takes longer than `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return not self.admitted_now

    def close(self) -> None:
        """Take nothing more; what runs ends on its own."""
        self.open, self._closed = False, True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self) -> None:
        self.admitted_now -= 1
        if not self.admitted_now:
            self._idle.set()

    def _pass_time(self) -> None:
        now = time.monotonic()
        # A job alone says how long one takes, and not how soon the next could end beside it.
        worked, self._since = (now - self._since) * min(1.0, self._jobs / self._workers), now
        # By time and not by ends: jobs of one run end at once, and would stand for all there was.
        kept = math.exp(-worked / _MEAN_SECONDS)
        self._worked, self._ends = kept * self._worked + worked, kept * self._ends

    def _ended(self, ticket: Ticket, of_use: bool) -> None:
        self._pass_time()
        self._ends += of_use
        self._jobs -= 1
        ticket.release()


def _is_of_use(ended: Future[Any]) -> bool:
    """Jobs that nobody waits for end early: they say nothing of how long others take."""
    return not ended.cancelled() and not isinstance(ended.exception(), (CancelledError, DeadlineError))


def _begun(call: Call, job: Callable[[], T]) -> T:
    call.begun = time.monotonic()
    call.deadline.check()
    return job()
