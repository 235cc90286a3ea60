"""Recording of served requests as a trace: a share of them, up to a bound, without anyone's name."""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Final

from numpy.typing import ArrayLike

from stca import folders
from stca.arrays import Array
from stca.errors import RequestError, UsageError
from stca.runtime.client_values import key_of, quoted
from stca.runtime.record import Names
from stca.runtime.request import Door
from stca.runtime.state import LOG
from stca.trace import SHARD_BYTES, Traced, TraceWriter

_KEY_BYTES: Final = 32


@dataclass(frozen=True)
class Recording:
    """What a session records.

    Attributes:
        folder: of the trace; it grows where one is there.
        share: of the requests that bring their history, drawn at random, above 0 and at most 1.
        max_bytes: most bytes of the folder; a request that does not fit is not recorded.
        key: 32 bytes, a secret, under which users become pseudonyms. Whoever has it can find a user's requests, to add
            labels or to delete them. None draws one that nobody learns.

    Raises:
        UsageError: naming what is out of its range.
    """

    folder: str | PathLike[str]
    share: float = 0.01
    max_bytes: int = 1 << 28
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not folders.usable(self.folder):
            raise UsageError(f"record: folder is {quoted(self.folder)}, expected a folder's path")
        if not isinstance(self.share, float | int) or isinstance(self.share, bool) or not 0 < self.share <= 1:
            raise UsageError(f"record: share is {quoted(self.share)}, expected a number above 0 and at most 1")
        if not isinstance(self.max_bytes, int) or isinstance(self.max_bytes, bool) or self.max_bytes < 0:
            raise UsageError(f"record: max_bytes is {quoted(self.max_bytes)}, expected a whole number from 0")
        if self.key is not None and (not isinstance(self.key, bytes) or len(self.key) != _KEY_BYTES):
            raise UsageError(f"record: key is of another kind or length, expected {_KEY_BYTES} bytes")


def pseudonym(user: Hashable, key: bytes) -> int:
    """What stands for a user in traces that were recorded under `key`, 64 bits."""
    return int.from_bytes(hashlib.sha256(Names(key).of(key_of("user", user)).encode()).digest()[:8], "big")


class Recorder:
    """Records requests. Safe to share between threads; what it cannot write costs no request its scores."""

    def __init__(self, wanted: Recording) -> None:
        self._writer = TraceWriter(
            wanted.folder, shard_bytes=min(SHARD_BYTES, max(1, wanted.max_bytes // 8)), max_bytes=wanted.max_bytes
        )
        self._share, self._key = float(wanted.share), wanted.key or secrets.token_bytes(_KEY_BYTES)
        self._random, self._lock = random.Random(), threading.Lock()
        self._open = True

    def offer(self, door: Door, inputs: dict[str, ArrayLike], row: Mapping[str, Array], user: Hashable) -> None:
        """Record a request, perhaps.

        Args:
            door: of the model; it checks the history, which a hit does not look at.
            inputs: as they were sent.
            row: the request and target inputs as they were admitted, with offsets.
            user: whose request.
        """
        if not self._open or self._random.random() >= self._share:
            return
        if not door.has_user(inputs):
            return  # a hit that brought no history
        try:
            history = door.admit({n: inputs[n] for n in door.names("user") if n in inputs}, "user")
            whom = None if user is None else pseudonym(user, self._key)
        except RequestError:
            return  # who asks is told where that matters
        whole = {n: x for n, x in {**history, **row}.items() if n not in door.offsets}
        with self._lock:
            try:
                if self._open and not self._writer.add(Traced(whole, None, whom, time.time())):
                    self._stop("it is as large as it may get")
            except UsageError as e:
                self._stop(str(e))

    def close(self) -> None:
        """Write what waits."""
        with self._lock:
            if self._open:
                self._stop("the session is closed")

    def _stop(self, why: str) -> None:
        self._open = False
        LOG.info("no more requests are recorded: %s", why)
        try:
            self._writer.flush()
        except UsageError as e:
            LOG.warning("the last recorded requests are lost: %s", e)
