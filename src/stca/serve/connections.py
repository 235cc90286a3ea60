"""Connections of the HTTP ports: bounded in number, and closed when they keep a server waiting for a request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Descriptors that a server needs besides: its bundles' files, its log, its threads'.
_OTHERS: Final = 64
_FEWEST, _LARGEST = 16, 1 << 16


def most_connections() -> int:
    """How many connections each of three ports may have: as many as this process may open, which is raised to what the
    system allows. Without descriptors a server could not accept another one, nor open a bundle.
    """
    allowed, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a sandbox or the kernel's own limit may not let it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        allowed = hard
    most = _LARGEST if allowed == resource.RLIM_INFINITY else min(allowed, _LARGEST)
    try:
        taken = len(os.listdir("/proc/self/fd"))
    except OSError:
        taken = 0
    return max(_FEWEST, (most - taken - _OTHERS) // 3)


class Connection(H11Protocol):
    """One client's connection.

    Args:
        seconds: how long the head of a request may take to arrive, from the connection or from its first byte on.
        most: connections of this port; beyond these, the one that was silent for longest makes room, first of those
            that never sent a request.
    """

    def __init__(self, *args: Any, seconds: float, most: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._seconds, self._most = seconds, most
        self._late: asyncio.TimerHandle | None = None
        self._heard = self.loop.time()
        self._asked = self._gone = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol.connection_made`."""
        super().connection_made(transport)
        self._watch()
        # What made room is here until the loop's next turn, and a burst of others comes before that.
        here = [c for c in self.connections if isinstance(c, Connection) and not c._gone]
        if len(here) > self._most:
            silent = [c for c in here if c._waits and c is not self] or [self]
            first = min(silent, key=lambda c: (c._asked, c._heard))
            first._gone = True
            first.transport.abort()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol.data_received`."""
        self._heard = self.loop.time()
        answered = self.conn.our_state is h11.DONE  # before its body was here, of which this is the rest
        super().data_received(data)
        self._asked |= not self._waits
        if answered and self.conn.their_state is h11.IDLE:
            self._unwatch()
            if not self.conn.trailing_data[0]:  # as after any other answer, which the rest came too late for
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
                return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol.connection_lost`."""
        self._unwatch()
        super().connection_lost(exc)

    @property
    def _waits(self) -> bool:
        """Whether no request is under way; of one that was answered before its body came, only that is."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

    def _watch(self) -> None:
        if not self._waits:
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(self._seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
