"""What it is worth to move memory between user states and rows of a table's file with the load, measured on a CPU.

    python benchmarks/memory_split_cpu.py --out benchmarks/results/NAME.json

A small reference model with random weights, its item table in a file. Rows are read past the page cache (O_DIRECT), as
from a disk that is cold; in it, a file is faster than kept rows (`row_cache.py`). The traffic is that of `stca load
--workload`, between the crowds of `memory_split.py`, and the policies that of its `--split`. Each workload comes at
`--load` of what the middle static split answers as fast as it can; the policies take turns on the same trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_split import MANY_ITEMS, MANY_USERS
from outcome import command, tell

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.timing import machine
from stca.checks.verify import prove
from stca.export.pipeline import CutOptions, export_checkpoint
from stca.export.reference.checkpoint import Checkpoint
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca
from stca.load.clients import InProcess
from stca.load.inputs import Inputs
from stca.load.run import LoadReport, run
from stca.load.traffic import Arrival, Traffic
from stca.load.workloads import WORKLOADS
from stca.runtime import MarginalUtility, Session, Static
from stca.runtime.row_cache import RowCache
from stca.tables import TableFile

HISTORY, TARGETS, BUDGET, BLOCK = 64, 20, 4 << 20, 4096
SHARES = (0.1, 0.4, 0.7)


class PastPageCache:
    """A table's file, each row of which comes from the disk."""

    def __init__(self, file: TableFile, folder: Path) -> None:
        self.spec, self._fd = file.spec, os.open(folder / file.spec.file, os.O_RDONLY | os.O_DIRECT)
        self._room = memoryview(mmap.mmap(-1, 2 * BLOCK))

    def rows(self, ids: Array) -> Array:
        """See `stca.runtime.tables.RowSource`."""
        size, made = self.spec.row_bytes, np.empty((len(ids), self.spec.width), np.float32)
        for row, at in zip(made, (ids * size).tolist(), strict=True):
            begin = at // BLOCK * BLOCK
            os.preadv(self._fd, [self._room[: -(-(at + size - begin) // BLOCK) * BLOCK]], begin)
            row[:] = np.frombuffer(self._room, np.float32, self.spec.width, at - begin)
        return made


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bundle = model(Path(folder))
        result: dict[str, Any] = {
            "command": command(),
            "machine": machine(1),
            "load": args.load,
            "seconds": args.seconds,
            "cache_bytes": BUDGET,
            **{w: measured(bundle, w, args) for w in args.workloads},
        }
    tell(result, args.out)


def model(folder: Path) -> Bundle:
    """Rows of 1,920 bytes, states of 64 KiB, as `memory_split.py` has them."""
    torch.manual_seed(0)
    config = StcaConfig(
        items=MANY_ITEMS.items, item_width=480, width=128, layers=2, ffn_expansion=8, max_history=HISTORY
    )
    checkpoint = Checkpoint(config, Stca(config).state_dict())
    cut = CutOptions(tables_above=1 << 20)
    return export_checkpoint(checkpoint, folder / "bundle", form="absorbed", cut=cut, prove=prove)


def measured(bundle: Bundle, workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """Latencies of each policy on one trace."""
    traffic = Traffic(
        users=MANY_USERS.users, zipf=MANY_USERS.zipf, items=MANY_USERS.items, items_zipf=MANY_USERS.items_zipf,
        towards=MANY_ITEMS, workload=workload, history=(HISTORY, HISTORY), targets=(TARGETS, TARGETS), events=0.0,
        seed=args.seed,
    )  # fmt: skip
    capacity = one(bundle, Static(SHARES[1]), traffic.trace(1000.0, 1.0), offline=True)[0].answered_per_second
    trace = traffic.trace(args.load * capacity, args.seconds)
    found: dict[str, Any] = {"a_second": args.load * capacity, "requests": len(trace)}
    for policy in (*map(Static, SHARES), MarginalUtility()):
        report, rows = one(bundle, policy, trace)
        name = f"static_{policy.rows}" if isinstance(policy, Static) else "adaptive"
        found[name] = {
            "latency_ms": report.latency_ms,
            "state_hits": report.hits / (report.hits + report.misses),
            "row_hits": rows,
            "memory_at_the_end": report.store["memory"],
            "timeline": [dataclasses.asdict(part) for part in report.timeline],
        }
        print(workload, name, found[name]["latency_ms"], report.store["memory"], file=sys.stderr, flush=True)
    return found


def one(bundle: Bundle, policy: Any, trace: list[Arrival], offline: bool = False) -> tuple[LoadReport, float]:
    """A session of its own on a trace, and the share of rows that were kept."""
    with Session.load(bundle.path, threads=1, cache_bytes=BUDGET, split=policy) as session:
        (rows,) = session._model.row_caches.values()
        assert isinstance(rows, RowCache)
        rows.source = PastPageCache(rows.source, bundle.path)  # type: ignore[assignment]
        report = run(InProcess(session), Inputs(session.manifest, HISTORY, 0), trace, connections=1, offline=offline)
        hits, misses = rows.counts
    return report, hits / (hits + misses)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=30.0, help="of each run")
    p.add_argument("--load", type=float, default=0.6, help="of what the middle static split answers")
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folder", help="on the disk to read from (default: the system's for temporary files)")
    p.add_argument("--out")
    return p.parse_args()


if __name__ == "__main__":
    main()
