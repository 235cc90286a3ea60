"""Rows kept in memory beside the mapped file that they are from, once that file is in the page cache.

    python benchmarks/row_cache.py [--out FILE.json]

Look-ups of ids that are nearly all kept, of a few pages and of many. The file and the cache take turns.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from outcome import command, tell

from stca.arrays import Array
from stca.runtime.options import POOL_PAGES
from stca.runtime.row_cache import RowCache
from stca.tables import TableFile, write_table

ROWS, WIDTH, PAGE_BYTES = 600_000, 64, 1 << 20
PAGES, COUNTS, TURNS = (8, 64, 128), (1000, 10_000), 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results, as JSON")
    args = parser.parse_args()
    from stca.checks.timing import machine

    with tempfile.TemporaryDirectory() as folder:
        rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)
        spec = write_table(Path(folder), "t", "items", ROWS, WIDTH, "float32", lambda begin, end: rows[begin:end])
        file = TableFile(Path(folder), spec)
        measured = [
            {"pages": pages, "ids": count, **lookups(file, pages, count)} for pages in PAGES for count in COUNTS
        ]
    tell(
        {
            "command": command(),
            "machine": {**machine(None), "python": platform.python_version(), "numpy": np.__version__},
            "row_bytes": spec.row_bytes,
            "page_bytes": PAGE_BYTES,
            "lookups": measured,
        },
        args.out,
    )


def lookups(file: TableFile, pages: int, count: int) -> dict[str, Any]:
    """Median milliseconds of both, and the share of rows that were kept."""
    cache, rng = RowCache(file, file.spec, PAGE_BYTES, POOL_PAGES), np.random.default_rng(1)
    cache.resize(pages)
    often = rng.permutation(ROWS)[: pages * cache.places * 3 // 4]
    for ids in np.array_split(np.concatenate([often, often]), 200):  # twice: of those that meet in a place, some went
        cache.rows(ids)
    hits, misses = cache.counts
    times: dict[str, list[float]] = {"kept_ms": [], "file_ms": []}
    for _ in range(TURNS):
        ids = rng.choice(often, count)
        times["file_ms"].append(_milliseconds(file.rows, ids))
        times["kept_ms"].append(_milliseconds(cache.rows, ids))
    after, missed = cache.counts
    share = (after - hits) / (after - hits + missed - misses)
    return {**{name: float(np.median(taken)) for name, taken in times.items()}, "kept": share}


def _milliseconds(look_up: Callable[[Array], Array], ids: Array) -> float:
    began = time.perf_counter()
    look_up(ids)
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    main()
