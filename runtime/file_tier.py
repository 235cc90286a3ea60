"""States in files of one folder: written behind the requests' back, read where memory has a state no more.

A file is put in place whole, and its digest is held against every byte before it is used: after a crash a record is
whole or discarded. One session at a time has the folder.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from stca import folders
from stca.errors import UsageError
from stca.runtime import record
from stca.runtime.cache import Kept
from stca.runtime.record import Header, Names
from stca.runtime.state import LOG, StateKey, UserState

# A user's state in memory and the seconds since it was made.
Fetch: TypeAlias = Callable[[Hashable], tuple[Kept, float] | None]
_SUFFIX, _NEW, _KEY = ".state", ".state.new", "key"
# Users whose states wait to be written; beyond, who waits longest is skipped.
_MOST_WAITING: Final = 1024
# How often states that are too old are looked for, and how long `close` lets the last ones be written.
_SWEEP_SECONDS, _CLOSE_SECONDS = 60.0, 5.0


@dataclass
class FileStats:
    """What a folder of states holds and did.

    Attributes:
        users: whose states it has.
        bytes: of their files.
        budget: most of `bytes`.
        reads: states that were found in it.
        read_seconds: what that took, all together.
        writes: states that were written.
        written_bytes: theirs.
        evictions: states that went for want of room.
        expired: states that became older than they may.
        skipped: states that changed or left memory before they were written, were too large, or made by an earlier call
            than the one that is written.
        discarded: records that were torn, changed, or of other weights.
        failed: records that could not be written.
    """

    users: int = 0
    bytes: int = 0
    budget: int = 0
    reads: int = 0
    read_seconds: float = 0.0
    writes: int = 0
    written_bytes: int = 0
    evictions: int = 0
    expired: int = 0
    skipped: int = 0
    discarded: int = 0
    failed: int = 0


class _Record(NamedTuple):
    version: str
    bytes: int
    born: float
    call: int  # which made the state; 0 where that was before this session


class FileTier:
    """A folder of states, least recently used out first. Safe to share between threads.

    Args:
        folder: made if need be; it is this session's alone while it is open.
        budget: most bytes of all records.
        fetch: the state of a user in memory.
        ttl_seconds: how long a state is kept after it was made; None for ever.
        clock: seconds since 1970.

    Raises:
        UsageError: when the folder cannot be used, or another session has it.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        fetch: Fetch,
        *,
        ttl_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._budget, self._fetch, self._ttl, self._clock = folder, budget, fetch, ttl_seconds, clock
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._handle = os.open(folder, os.O_RDONLY)
        except OSError as e:
            raise UsageError(f"state_folder: {folder} cannot be used ({e.strerror}); name a folder of your own") from e
        try:
            folders.lock(self._handle)
            self._names = Names(_folder_key(folder))
        except OSError as e:
            os.close(self._handle)
            taken = isinstance(e, BlockingIOError)
            why = "another session has it; close that one, or name another folder" if taken else f"it fails ({e})"
            raise UsageError(f"state_folder: {folder} cannot be used: {why}") from e
        self._changed = threading.Condition()
        self._kind = ""
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._waiting: OrderedDict[Hashable, None] = OrderedDict()
        self._writing: str | None = None  # a user's name, None too once that record is unwanted
        self._done = FileStats(budget=budget)
        self._closed = False
        self._swept = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="stca-state-files", daemon=True)

    def serve(self, weights: str, format: str) -> None:
        """Keep states of this kind, and discard all others."""
        with self._changed:
            kind = self._names.of((weights, format))
            if kind == self._kind:
                return
            self._kind, self._writing = kind, None
            self._waiting.clear()
            for name in list(self._records):
                self._remove(name)
                self._done.discarded += 1
            if not self._thread.is_alive() and not self._closed:
                self._open()
                self._thread.start()

    def _open(self) -> None:
        """Take in the records of before, oldest first; what is none of them goes."""
        found = []
        for path in self._folder.iterdir():
            if path.name.endswith(_NEW):
                self._unlink(path)
            elif path.name.endswith(_SUFFIX):
                try:
                    header = record.read_header(path)
                    fits = (header.kind, header.user + _SUFFIX) == (self._kind, path.name)
                except (OSError, ValueError):
                    fits = False
                if fits:
                    found.append((path.stat().st_mtime, header, path.stat().st_size))
                else:
                    self._unlink(path)
                    self._done.discarded += 1
        for _, header, size in sorted(found, key=lambda one: one[0]):
            self._add(header, size, 0)
        self._expire()
        self._make_room(0)

    def offer(self, user: Hashable) -> None:
        """Write the user's state, when there is time."""
        with self._changed:
            self._waiting[user] = None
            self._waiting.move_to_end(user)
            if len(self._waiting) > _MOST_WAITING:
                self._waiting.popitem(last=False)
                self._done.skipped += 1
            self._changed.notify_all()

    def bytes_of(self, user: Hashable, version: Hashable = None) -> int | None:
        """Bytes of the user's record, of whatever version where that is None; None where there is none."""
        name = self._names.of(user)
        with self._changed:
            self._expire(name)
            held = self._records.get(name)
            return held.bytes if held and (version is None or held.version == self._names.of(version)) else None

    def read(self, key: StateKey, keep: Callable[..., object]) -> tuple[UserState | None, bool]:
        """The state with exactly this key, and whether there was one that was damaged.

        Args:
            key: of the kind that is served.
            keep: `StateCache.put`, told of the state unless its user was forgotten meanwhile.
        """
        name, version = self._names.of(key.user), self._names.of(key.version)
        with self._changed:
            self._expire(name)
            held = self._records.get(name)
            if held is None or held.version != version or self._names.of((key.weights, key.format)) != self._kind:
                return None, False
            self._records.move_to_end(name)
            kind = self._kind
        began = time.perf_counter()
        try:
            header, tensors = record.read(self._path(name))
            if (header.user, header.version, header.kind) != (name, version, kind):
                raise ValueError("it is another's")
        except (OSError, ValueError) as e:
            return None, self._discard(name, held, e)
        state = UserState(tensors, header.tokens, header.history)
        with self._changed:
            self._done.reads += 1
            self._done.read_seconds += time.perf_counter() - began
            if self._records.get(name) is held:
                keep(key, state, call=held.call, age=max(0.0, self._clock() - header.born))
        return state, False

    def _discard(self, name: str, held: _Record, why: Exception) -> bool:
        """Whether it was the record itself, and not one that was replaced or went while it was read."""
        with self._changed:
            if self._records.get(name) is not held:
                return False
            self._remove(name)
            self._done.discarded += 1
        LOG.warning("a user state in a file was discarded: %s", " ".join(str(why).split())[:200])
        return True

    def forget(self, user: Hashable) -> bool:
        """Remove the user's record, and write none that is under way; False when there was none.

        Raises:
            UsageError: when its file stays, as the folder cannot be written to any more.
        """
        name = self._names.of(user)
        with self._changed:
            self._waiting.pop(user, None)
            if self._writing == name:
                self._writing = None
            found, path = self._remove(name), self._path(name)
            if path.exists():
                self._unlink(path)
        if path.exists():
            raise UsageError(f"state_folder: a file in {self._folder} cannot be removed; see to its mode, forget again")
        return found

    def wait(self, seconds: float) -> bool:
        """Wait until all that was offered is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._writing is None, seconds)

    def close(self) -> None:
        """Write what waits, for a few seconds at most, and let go of the folder. The records stay."""
        self.wait(_CLOSE_SECONDS if self._thread.is_alive() else 0)
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_SECONDS)
        os.close(self._handle)

    def stats(self) -> FileStats:
        """Counters and sizes, taken at one moment."""
        with self._changed:
            self._expire()
            return FileStats(**{**vars(self._done), "users": len(self._records)})

    # --- the thread that writes ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed, _SWEEP_SECONDS)
                if self._closed:
                    return
                self._expire()
                if not self._waiting:
                    continue
                user, _ = self._waiting.popitem(last=False)
                self._writing = name = self._names.of(user)
                kind = self._kind
            try:
                self._write(user, name, kind)
            except Exception as e:  # whatever it is, the next state is written
                said = getattr(e, "strerror", None) or type(e).__name__
                LOG.warning("a user state was not written to %s: %s", self._folder, said)
                with self._changed:
                    self._unlink(self._path(name, _NEW))
                    self._done.failed += 1
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()

    def _write(self, user: Hashable, name: str, kind: str) -> None:
        kept, age = self._fetch(user) or (None, 0.0)
        version = "" if kept is None else self._names.of(kept.key.version)
        tensors = {n: x for n, x in (kept.state.tensors if kept else {}).items() if isinstance(x, np.ndarray)}
        with self._changed:
            if (held := self._records.get(name)) is not None and held.version == version:
                return
            fits = kept is not None and kept.state.row_bytes < self._budget and len(tensors) == len(kept.state.tensors)
            if kept is None or not fits or self._names.of((kept.key.weights, kept.key.format)) != kind:
                self._done.skipped += 1
                return
            if held is not None and held.call > kept.call:
                self._done.skipped += 1
                return
        state = kept.state
        header = Header(name, version, kind, self._clock() - age, state.tokens, state.history)
        new = self._path(name, _NEW)
        size = record.write(new, header, tensors)
        with self._changed:
            if self._writing != name or self._closed or size > self._budget:  # unwanted meanwhile
                new.unlink(missing_ok=True)
                self._done.skipped += 1
                return
            self._remove(name)
            self._make_room(size)
            os.replace(new, self._path(name))
            self._add(header, size, kept.call)
            self._done.writes += 1
            self._done.written_bytes += size

    # --- with the lock held -------------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> None:
        while self._records and self._done.bytes + size > self._budget:
            self._remove(next(iter(self._records)))
            self._done.evictions += 1

    def _add(self, header: Header, size: int, call: int) -> None:
        self._records[header.user] = _Record(header.version, size, header.born, call)
        self._done.bytes += size

    def _remove(self, name: str) -> bool:
        held = self._records.pop(name, None)
        if held is None:
            return False
        self._done.bytes -= held.bytes
        self._unlink(self._path(name))
        return True

    def _unlink(self, path: Path) -> None:
        """A file that cannot be removed costs no request; it is read no more, and looked at when a session starts."""
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            LOG.warning("a user state was not removed from %s: %s", self._folder, e.strerror)

    def _expire(self, asked: str | None = None) -> None:
        """Remove what is too old: the record asked for, and now and then all others."""
        if self._ttl is None:
            return
        names = [asked]
        if asked is None or time.monotonic() - self._swept > _SWEEP_SECONDS:
            self._swept, names = time.monotonic(), [*self._records]
        now = self._clock()
        for name in names:
            if name is not None and name in self._records and self._records[name].born + self._ttl <= now:
                self._remove(name)
                self._done.expired += 1

    def _path(self, name: str, suffix: str = _SUFFIX) -> Path:
        return self._folder / (name + suffix)


def _folder_key(folder: Path) -> bytes:
    """The folder's key; made where there is none, and then no record can be of it."""
    path = folder / _KEY
    try:
        key = path.read_bytes()
        if len(key) == 32:
            return key
    except FileNotFoundError:
        pass
    key, new = os.urandom(32), folder / (_KEY + ".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(key)
    os.replace(new, path)
    return key
