"""Engines built before, by everything that went into them; and, for one that is not there, what went in differently."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stca.bundle import sha256_of

# What went into an engine, in the order in which a miss names it.
Parts = Mapping[str, Any]
_WORDS: Final = {"graph": "the graph", "weights": "the weights", "builder": "stca's own builder", "sm": "SM"}


def key_of(parts: Parts) -> str:
    """Digest of all parts: two engines with one key are the same engine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def why_missed(parts: Parts, known: Iterable[Parts]) -> str:
    """What sets these parts apart from the nearest engine of the same graph and flavour that was built before."""
    best: list[str] | None = None
    for other in known:
        if (other.get("name"), other.get("flavour")) != (parts["name"], parts["flavour"]):
            continue
        changed = [name for name in parts if parts[name] != other.get(name)]
        if best is None or len(changed) < len(best):
            best = changed
            nearest = other
    if best is None:
        return f"no {parts['flavour']} engine of {parts['name']} was built before"
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
class EngineCache:
    """A directory of the user's own with plans and what is known of them, least recently used out first.

    A plan is code to the library that loads it, so this directory must be as private as a home directory.

    Attributes:
        root: made when the first engine is put there.
        limit_bytes: most bytes of plans to keep.
    """

    root: Path
    limit_bytes: int = 16 << 30

    @classmethod
    def default(cls) -> EngineCache:
        """`$XDG_CACHE_HOME/stca`, or `~/.cache/stca`."""
        return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "stca"))

    def get(self, key: str) -> tuple[dict[str, Any], Path] | None:
        """The manifest entry and the plan of an engine, if both are there and whole."""
        record, plan = self._files(key)
        try:
            stored = json.loads(record.read_text())
            if sha256_of(plan) != stored["sha256"]:
                return None
        except (OSError, ValueError, KeyError):
            return None
        with contextlib.suppress(OSError):  # somebody else's build may have taken it out meanwhile
            os.utime(plan)
        entry: dict[str, Any] = stored["entry"]
        return entry, plan

    def put(self, key: str, entry: Mapping[str, Any], plan: Path) -> None:
        """Keep a copy of `plan`; whoever reads meanwhile sees the old one or the new one."""
        folder = self.root / "engines"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        record, kept = self._files(key)
        part = folder / f".{key}.{os.getpid()}"
        try:
            shutil.copyfile(plan, part)
            digest = sha256_of(part)
            part.replace(kept)
            part.write_text(json.dumps({"entry": entry, "sha256": digest}))
            part.replace(record)
        finally:
            part.unlink(missing_ok=True)
        self._prune(key)

    def known(self) -> list[Parts]:
        """Parts of every engine that was built before, also of those whose plan is gone."""
        found: list[Parts] = []
        for record in self.root.glob("engines/*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(json.loads(record.read_text())["entry"]["key"])
        return found

    def timing(self, flavour: str, version: str, sm: int | None) -> Path:
        """Where kernel timings of one library on one kind of GPU are kept."""
        return self.root / "timing" / f"{flavour}-{version}-sm{sm}.bin"

    def _files(self, key: str) -> tuple[Path, Path]:
        return self.root / "engines" / f"{key}.json", self.root / "engines" / f"{key}.plan"

    def _prune(self, keep: str) -> None:
        found = []
        for plan in self.root.glob("engines/*.plan"):
            with contextlib.suppress(OSError):  # as above
                found.append((plan.stat().st_mtime, plan.stat().st_size, plan))
        total = 0
        for _, size, plan in sorted(found, reverse=True):
            total += size
            if total > self.limit_bytes and plan.stem != keep:
                plan.unlink(missing_ok=True)
