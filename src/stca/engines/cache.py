"""Engines built before, by everything that went into them; and, for one that is not there, what went in differently."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stca import typed_json
from stca.arrays import Progress
from stca.bundle import sha256_of
from stca.manifest import EngineEntry

# What went into an engine, in the order in which a miss names it.
Parts = Mapping[str, Any]
# Records that are kept, also of plans that made room: they tell what changed since.
_RECORDS: Final = 256
_WORDS: Final = {"graph_sha256": "the graph", "weights": "the weights", "builder": "stca's own builder", "sm": "SM"}


def key_of(parts: Parts) -> str:
    """Digest of all parts: two engines with one key are the same engine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def why_missed(parts: Parts, known: Iterable[Parts]) -> str:
    """What sets these parts apart from the nearest engine of the same graph and flavour that was built before."""
    best: list[str] | None = None
    for other in known:
        if (other.get("graph"), other.get("flavour")) != (parts["graph"], parts["flavour"]):
            continue
        changed = [name for name in parts if parts[name] != other.get(name)]
        if best is None or len(changed) < len(best):
            best = changed
            nearest = other
    if best is None:
        return f"no {parts['flavour']} engine of {parts['graph']} was built before"
    if not best:
        return "it was built before, but its file is gone or damaged"
    return "; ".join(
        f"{_WORDS.get(name, name)} changed from {_short(nearest.get(name))} to {_short(parts[name])}" for name in best
    )


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    if isinstance(value, list):  # of profiles
        return " and ".join(", ".join(f"{d} {low}–{high}" for d, (low, _, high) in p.items()) for p in value) or "none"
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class _Record:
    """What is written beside a plan."""

    entry: EngineEntry
    sha256: str

    @classmethod
    def read(cls, file: Path) -> _Record:
        """Raises OSError, TypeError or ValueError for what is no record."""
        raw = typed_json.as_type(Mapping[str, Any], typed_json.parse(file.read_text(encoding="utf-8")), file.name)
        return cls(EngineEntry.of(raw.get("entry")), typed_json.as_type(str, raw.get("sha256"), file.name))


@dataclass(frozen=True)
class EngineCache:
    """A directory of the user's own with plans and what is known of them, least recently used out first.

    A plan is code to the library that loads it, so only a directory that nobody else can write to is used.

    Attributes:
        root: made when the first engine is put there.
        limit_bytes: most bytes of plans to keep.
    """

    root: Path
    limit_bytes: int = 16 << 30

    @classmethod
    def default(cls) -> EngineCache | None:
        """`$XDG_CACHE_HOME/stca`, or `~/.cache/stca`; none for a user without a home. Relative paths do not count."""
        places = (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(os.path.expanduser("~"), ".cache"))
        place = next((place for place in places if os.path.isabs(place)), None)
        return cls(Path(place, "stca")) if place else None

    def distrusted(self) -> str | None:
        """Why nothing may be taken from here, or None: someone else owns the directory or can write to it."""
        if not hasattr(os, "getuid"):
            return None
        for folder in (self.root, self.root / "engines", self.root / "timing"):
            try:
                found = folder.lstat()
            except OSError:
                continue  # it is not there, or cannot be read either
            if not stat.S_ISDIR(found.st_mode):
                return f"{folder} is no directory; remove it"
            if found.st_uid != os.getuid():
                return f"{folder} is another user's; set XDG_CACHE_HOME to a directory of your own"
            if found.st_mode & 0o022:
                return f"others can write to {folder}; remove it, or run chmod -R go-w on it if all in it is yours"
        return None

    def get(self, key: str) -> tuple[EngineEntry, Path] | None:
        """The manifest entry and the plan of an engine, if both are there, whole and the user's own."""
        record, plan = self._files(key)
        try:
            stored = _Record.read(record)
            if self.distrusted() or not _is_own(plan) or not _is_own(record) or sha256_of(plan) != stored.sha256:
                return None
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        with contextlib.suppress(OSError):  # somebody else's build may have taken it out meanwhile
            os.utime(plan)
        return stored.entry, plan

    def put(self, key: str, entry: EngineEntry, plan: Path) -> None:
        """Keep a copy of a plan; whoever reads meanwhile sees the old one or the new one.

        Args:
            key: of what it was built from and for.
            entry: the manifest's entry for it.
            plan: the file.

        Raises:
            OSError: when it cannot be written, or others can write there.
        """
        folder = self.root / "engines"
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        if why := self.distrusted():
            raise PermissionError(errno.EPERM, why)
        record, kept = self._files(key)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as work:  # a name that nobody can lay a link at
            part = Path(work, "plan")
            shutil.copyfile(plan, part)
            digest = sha256_of(part)
            part.replace(kept)
            part.write_text(json.dumps({"entry": dataclasses.asdict(entry), "sha256": digest}), encoding="utf-8")
            part.replace(record)
        self._prune(key)

    def known(self) -> list[Parts]:
        """Parts of every engine that was built before, also of those whose plan is gone."""
        found: list[Parts] = []
        for record in self.root.glob("engines/*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                found.append(_Record.read(record).entry.key)
        return found

    def timing(self, flavour: str, version: str, sm: int | None) -> Path:
        """Where kernel timings of one library on one kind of GPU are kept.

        Args:
            flavour: tensorrt or tensorrt-rtx.
            version: of the library.
            sm: the GPU's compute capability, 90 for 9.0; None for the GPU that is here.
        """
        return self.root / "timing" / f"{flavour}-{version}-sm{sm}.bin"

    def _files(self, key: str) -> tuple[Path, Path]:
        return self.root / "engines" / f"{key}.json", self.root / "engines" / f"{key}.plan"

    def _prune(self, keep: str) -> None:
        for left in self.root.glob("engines/.*"):  # by processes that were killed
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - 86_400:
                    shutil.rmtree(left, ignore_errors=True)
        found = []
        for plan in self.root.glob("engines/*.plan"):
            with contextlib.suppress(OSError):  # as above
                found.append((plan.stat().st_mtime, plan.stat().st_size, plan))
        records = []
        for record in self.root.glob("engines/*.json"):
            with contextlib.suppress(OSError):
                records.append((record.stat().st_mtime, record.stem))
        for _, key in sorted(records, reverse=True)[_RECORDS:]:
            record, plan = self._files(key)
            if not plan.exists():
                with contextlib.suppress(OSError):
                    record.unlink()
        total = 0
        for _, size, plan in sorted(found, reverse=True):
            total += size
            if total > self.limit_bytes and plan.stem != keep:
                with contextlib.suppress(OSError):
                    plan.unlink()


def trusted(cache: EngineCache | None, progress: Progress) -> EngineCache | None:
    """The cache, or none where others could have put something into it; `progress` is told why."""
    if cache and (why := cache.distrusted()):
        progress(f"the engine cache is not used: {why}")
        return None
    return cache


def _is_own(file: Path) -> bool:
    """Whether a file is a plain one of this user's, which nobody else can write to."""
    found = file.lstat()
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    return stat.S_ISREG(found.st_mode) and mine
