"""What it is worth to move memory between user states and rows of a table's file with the load, measured on a CPU.

    python benchmarks/memory_split_cpu.py --out benchmarks/results/NAME.json

A small reference model with random weights, its item table in a file. Rows are read past the page cache (O_DIRECT), as
from a disk that is cold; in it, a file is faster than kept rows (`row_cache.py`). The traffic is that of `stca load
--workload`, between the crowds of `memory_split.py`. The policies take turns at each request, so that other work on the
machine is alike for all, and decide by requests. What is measured is each one's time; when requests come is drawn, and
how they wait for each other follows from both.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_split import MANY_ITEMS, MANY_USERS, latencies, work_of
from outcome import command, tell

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.timing import machine
from stca.checks.verify import prove
from stca.export.pipeline import CutOptions, export_checkpoint
from stca.export.reference.checkpoint import Checkpoint
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca
from stca.load.inputs import Inputs
from stca.load.traffic import Traffic
from stca.load.workloads import TREND, WORKLOADS
from stca.runtime import MarginalUtility, Request, Session, Static
from stca.runtime.memory_pool import MemoryPool
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
            "requests_between_decisions": args.every,
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
    """What each policy took on one trace, all of them in turn at each request."""
    traffic = Traffic(
        users=MANY_USERS.users, zipf=MANY_USERS.zipf, items=MANY_USERS.items, items_zipf=MANY_USERS.items_zipf,
        towards=MANY_ITEMS, workload=workload, history=(HISTORY, HISTORY), targets=(TARGETS, TARGETS), events=0.0,
        seed=args.seed,
    )  # fmt: skip
    trace = traffic.trace(args.requests, 1.0)
    policies: dict[str, Any] = {**{f"static_{share}": Static(share) for share in SHARES}, "adaptive": MarginalUtility()}
    sessions = {name: session_of(bundle, policy) for name, policy in policies.items()}
    inputs = Inputs(bundle.manifest, HISTORY, 0)
    work = {name: np.empty(len(trace)) for name in policies}
    hits, shares = dict.fromkeys(policies, 0), []
    for i, arrival in enumerate(trace):
        rest = inputs.targets(arrival.targets, i, arrival.items, arrival.items_zipf)
        request = Request({**inputs.user(arrival.user, HISTORY), **rest}, arrival.user, 1)
        for name in np.roll(list(policies), i).tolist():
            began = time.perf_counter()
            hits[name] += sessions[name].answer(request).hits[0]
            work[name][i] = time.perf_counter() - began
            if i % args.every == 0:
                pool_of(sessions[name]).step()
        shares.append(1 - sessions["adaptive"].memory()["states"] / BUDGET)
    # A busiest tenth that is full would make each static split's queue grow without end.
    rate = args.load / min(work_of(work[name], workload == TREND) for name in policies if name != "adaptive")
    found: dict[str, Any] = {"requests": len(trace), "a_second": rate}
    for name, session in sessions.items():
        found[name] = {**latencies(work[name], rate, args.seed), "state_hits": hits[name] / len(trace)}
        session.close()
    found["adaptive"]["rows_share"] = [min(shares), float(np.mean(shares)), max(shares)]
    print(workload, found, file=sys.stderr, flush=True)
    return found


def session_of(bundle: Bundle, policy: Any) -> Session:
    """Whose pool decides when it is told to, and whose rows come from the disk."""
    session = Session.load(bundle.path, threads=1, cache_bytes=BUDGET, split=policy)
    pool_of(session).close()
    (rows,) = session._model.row_caches.values()
    rows.source = PastPageCache(rows.source, bundle.path)  # type: ignore[assignment]
    return session


def pool_of(session: Session) -> MemoryPool:
    """The session's."""
    assert session._pool is not None
    return session._pool


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=float, default=4000.0)
    p.add_argument("--every", type=int, default=10, help="requests between two decisions")
    p.add_argument("--load", type=float, default=0.8, help="of what the best static split could serve at most")
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--folder", help="on the disk to read from (default: the system's for temporary files)")
    p.add_argument("--out")
    return p.parse_args()


if __name__ == "__main__":
    main()
