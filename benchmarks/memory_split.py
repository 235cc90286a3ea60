"""What it is worth to move memory between user states and rows of tables with the load, in simulated time.

    python benchmarks/memory_split.py --out benchmarks/results/NAME.json

The runtime's own pool, state cache, row cache and policies serve a trace; only what misses cost is simulated, by the
costs that the result states. One server takes requests as they come (Poisson), so that work makes others wait.
Requests come at `--load` of what the static split with the least work could serve at most; in a trend, of what it could
in its busiest tenth, as no static split survives one otherwise. The best static split is the one, of a grid, with the
least p99 on the whole trace, known afterwards. `MarginalUtility` was set up on seeds 0 to 4; others tell its worth.

The workloads are those of `stca load --workload`, between many users of few items and few users of many items. The
memory is small, so that it fills within some hundred requests: what a phase costs until then is too seldom for a p99.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from outcome import command, tell

from stca.arrays import Array
from stca.load.workloads import BURST, STEADY, TREND, WORKLOADS, Crowd, crowds, ranks, which
from stca.runtime.cache import StateCache
from stca.runtime.memory_pool import MarginalUtility, MemoryPool, SplitPolicy, StatePages, Static
from stca.runtime.reuse import Reuse
from stca.runtime.row_cache import RowCache
from stca.runtime.state import StateKey, UserState
from stca.specs import TableSpec

PAGES, PAGE_BYTES = 64, 1 << 16
STATE_BYTES, WIDTH, TARGETS, HISTORY = 1 << 16, 480, 40, 28
# What things take, in seconds: a hit; to encode a user, three times that, as measured (README); to read a row that is
# not in memory.
HIT, ENCODE, READ = 10e-3, 30e-3, 600e-6
# Parts of a trace whose best split the foreseen run has.
PARTS = {STEADY: 1, TREND: 10, BURST: 4}
# Decisions that it comes late by.
LATE = (0, 2, 4)
MANY_USERS, MANY_ITEMS = Crowd(75, 0.5, 320, 1.2), Crowd(12, 0.8, 1680, 0.5)


class Reads:
    """A table whose rows take their time, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def rows(self, ids: Array) -> Array:
        self.now += READ * len(ids)
        return np.zeros((len(ids), WIDTH), np.float32)


class Unwatched(Reuse):
    """Of policies that do not look at what was asked for: following it takes most of a run's time."""

    def ask(self, keys: Array, size: int) -> None:
        """Forget it."""


class Foreseen:
    """What no controller can know: the share for rows that is best in each part of a trace, as the part begins.

    Args:
        shares: of the parts, which are alike long.
        decisions: in the whole trace.
        late: by how many of them it follows.
    """

    def __init__(self, shares: list[float], decisions: int, late: int) -> None:
        self._shares, self._decisions, self._made = shares, decisions, -late

    def wanted(self, pages: Mapping[str, int], saved: Mapping[str, Array]) -> Mapping[str, int]:
        """See `SplitPolicy`; the pool decides once before the trace."""
        part = max(0, self._made - 1) * len(self._shares) // self._decisions
        self._made += 1
        return Static(self._shares[part]).wanted(pages, saved)


class Drawn:
    """Users and items by Zipf's law, the frequent ones anywhere among them."""

    def __init__(self, crowd: Crowd, rng: np.random.Generator) -> None:
        # The same items lead in every one.
        self._rng, self._items = rng, np.random.default_rng(0).permutation(MANY_ITEMS.items)[: crowd.items]
        self._crowd = crowd

    def user(self) -> int:
        return int(ranks(self._crowd.users, self._crowd.zipf, self._rng.random(1))[0])

    def items(self, count: int) -> Array:
        found: Array = self._items[ranks(self._crowd.items, self._crowd.items_zipf, self._rng.random(count))]
        return found


def trace(workload: str, requests: int, seed: int) -> Iterator[tuple[int, Array, Array]]:
    """The user, the targets and the history of each request."""
    rng = np.random.default_rng(seed)
    drawn = [Drawn(crowd, rng) for crowd in crowds(workload, MANY_USERS, MANY_ITEMS)]
    for number in which(workload, np.arange(requests) / requests, rng).tolist():
        now = drawn[number]
        yield now.user(), now.items(TARGETS), now.items(HISTORY)


def main() -> None:
    args = _arguments()
    result: dict[str, Any] = {
        "command": command(),
        "costs": {"hit_s": HIT, "encode_s": ENCODE, "read_s": READ},
        "memory": {"pages": PAGES, "page_bytes": PAGE_BYTES, "state_bytes": STATE_BYTES, "row_bytes": 4 * WIDTH},
        "requests": args.requests,
        "load": args.load,
        "requests_between_decisions": args.every,
    }
    with ProcessPoolExecutor(args.processes) as pool:
        jobs = {(w, seed): pool.submit(compared, w, seed, args) for w in args.workloads for seed in args.seeds}
        for workload in args.workloads:
            seeds = {seed: jobs[workload, seed].result() for seed in args.seeds}
            result[workload] = {
                who: {
                    what: told([1 - of[who][what] / of["best_static"][what] for of in seeds.values()])
                    for what in ("p50_ms", "p99_ms", "mean_ms", "work_ms")
                }
                for who in seeds[args.seeds[0]]
                if who == "adaptive" or who.endswith("_late")
            }
            print(workload, json.dumps(result[workload]), file=sys.stderr, flush=True)
            result[workload]["seeds"] = seeds
    tell(result, args.out)


def told(less: list[float]) -> dict[str, float]:
    """Of the shares by which something is less than the best static split's, over seeds."""
    return {"less_on_average": float(np.mean(less)), "less_at_worst": min(less)}


def compared(workload: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What became of one trace."""
    grid: list[float] = np.linspace(0.1, 0.7, args.grid).round(3).tolist()
    runs = {share: served(workload, seed, Static(share), args) for share in grid}
    rate = args.load / min(work_of(work, workload == TREND) for work, _ in runs.values())

    def of(run: tuple[Array, dict[str, Any]]) -> dict[str, Any]:
        return {**latencies(run[0], rate, seed), **run[1]}

    statics = {share: of(run) for share, run in runs.items()}
    best = min(grid, key=lambda share: statics[share]["p99_ms"])
    seen = foreseen([runs[share][0] for share in grid], grid, PARTS[workload])
    decisions = -(-args.requests // args.every)
    return {
        "a_second": rate,
        "best_static_rows_share": best,
        "best_static": statics[best],
        "adaptive": of(served(workload, seed, MarginalUtility(), args)),
        "foreseen_shares": seen,
        **{
            f"foreseen_{late * args.every}_late": of(served(workload, seed, Foreseen(seen, decisions, late), args))
            for late in (LATE if workload == BURST else LATE[:1])
        },
        "statics_p99_ms": {share: one["p99_ms"] for share, one in statics.items()},
    }


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=20_000)
    p.add_argument("--load", type=float, default=0.8, help="of what the best static split could serve at most")
    p.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    p.add_argument("--every", type=int, default=10, help="requests between two decisions")
    p.add_argument("--grid", type=int, default=5, help="static splits that are tried")
    p.add_argument("--seeds", type=int, nargs="+", default=range(5, 10))
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--out")
    return p.parse_args()


def work_of(work: Array, busiest: bool) -> float:
    """Seconds of a request: on average, or in the tenth of a trace that takes most, at whose rate no queue grows."""
    return float(max(part.mean() for part in np.array_split(work, 10)) if busiest else work.mean())


def foreseen(works: list[Array], grid: list[float], parts: int) -> list[float]:
    """Of each part of a trace, the share of the grid with the least work in it."""
    means = [[part.mean() for part in np.array_split(work, parts)] for work in works]
    return [grid[best] for best in np.argmin(means, axis=0).tolist()]


def latencies(work: Array, rate: float, seed: int) -> dict[str, float]:
    """Of requests that take so many seconds each, at so many a second; the first sixth left out."""
    arrives = np.random.default_rng(seed + 1).exponential(1 / rate, len(work)).cumsum()
    free, found = 0.0, np.empty(len(work))
    for i, (at, seconds) in enumerate(zip(arrives.tolist(), work.tolist(), strict=True)):
        free = max(free, at) + seconds
        found[i] = free - at
    kept = found[len(found) // 6 :] * 1e3
    p50, p99 = np.percentile(kept, (50, 99)).tolist()
    return {"p50_ms": p50, "p99_ms": p99, "mean_ms": float(kept.mean()), "work_ms": float(work.mean() * 1e3)}


def served(workload: str, seed: int, policy: SplitPolicy, args: argparse.Namespace) -> tuple[Array, dict[str, Any]]:
    """Seconds of work of each request of a workload, and what became of the memory: neither depends on the rate."""
    reads = Reads()
    spec = TableSpec("items", "", "", "float32", MANY_ITEMS.items, WIDTH, 1)
    rows = RowCache(reads, spec, PAGE_BYTES, PAGES, clock=reads.clock)  # type: ignore[arg-type]
    states = StateCache(0, cost=lambda *_: STATE_BYTES)
    pool = MemoryPool(PAGES, StatePages(states, PAGE_BYTES, PAGES, lambda: ENCODE), policy)
    if not isinstance(policy, MarginalUtility):
        rows._reuse = states._reuse = Unwatched(PAGE_BYTES, PAGES)
    pool.serve({"items": rows})
    work, shares, misses = np.full(args.requests, HIT), [], 0
    for i, (user, targets, history) in enumerate(trace(workload, args.requests, seed)):
        key, began = StateKey(user, 0, "", ""), reads.now
        if states.get(key) is None:
            misses += 1
            rows.rows(history)
            work[i] += ENCODE
            states.put(key, UserState({}, 0))
        rows.rows(targets)
        work[i] += reads.now - began
        shares.append(pool.split["items"] / PAGES)
        if i % args.every == 0:
            pool.step()
    hits, missed = rows.counts
    return work, {
        "state_hits": 1 - misses / args.requests,
        "row_hits": hits / (hits + missed),
        "rows_share": [float(min(shares)), float(np.mean(shares)), float(max(shares))],
        "moves": pool.moves,
    }


if __name__ == "__main__":
    main()
