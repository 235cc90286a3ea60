"""An engine's files: in a bundle, in the cache, and the sources that made them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stca
from stca.arrays import Progress
from stca.engines.cache import EngineCache
from stca.manifest import EngineEntry


def keep(cache: EngineCache | None, key: str, entry: EngineEntry, file: Path, progress: Progress) -> None:
    """Put an engine into the cache; one that cannot be written to loses nobody a finished engine."""
    if cache:
        try:
            cache.put(key, entry, file)
        except OSError as e:
            progress(f"{entry.file} is not kept in {cache.root} ({e.strerror}); --no-cache does without")


def place_of(entry: EngineEntry) -> tuple[Any, ...]:
    """What a bundle has one engine for: the graph first, then what the engines of both halves have in common."""
    return entry.graph, entry.flavour, entry.provider, entry.precision, entry.sm


def with_weights(file: Path) -> Iterator[Path]:
    """An engine's files: itself, and the weights that a typed graph has beside it."""
    yield file
    if (weights := file.with_suffix(".weights")).exists():
        yield weights


def digest_of_sources(*names: str) -> str:
    """Digest of the package's sources; of a folder, all that lie in it and below: the table of tiles is one of them."""
    digest = hashlib.sha256()
    for name in names:
        places = (Path(place, name) for place in stca.__path__)  # two of them in a copy without links
        path = next(p for p in places if p.is_dir() or (p.suffix and p.is_file()))
        below = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for file in sorted(below) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
