"""What it is worth to move memory between user states and rows of tables with the load, in simulated time.

    python benchmarks/memory_split.py --out benchmarks/results/NAME.json

The runtime's own pool, state cache, row cache and policies serve a trace; only what misses cost is simulated, by the
costs that the result states. One server takes requests as they come (Poisson), so that work makes others wait. The best
static split is the one, of a grid, with the least p99 on the whole trace, known afterwards.

`steady`: the same users and items throughout. `trend`: from many users and few items to few users and many items.
`burst`: few users and many items, and many users and few items for a while, again and again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from outcome import command, tell

from stca.arrays import Array
from stca.manifest import TableSpec
from stca.runtime.cache import StateCache
from stca.runtime.memory_pool import MarginalUtility, MemoryPool, SplitPolicy, StatePages, Static
from stca.runtime.row_cache import RowCache
from stca.runtime.state import StateKey, UserState

PAGES, PAGE_BYTES = 64, 1 << 20
STATE_BYTES, WIDTH, TARGETS, HISTORY = 64 << 10, 64, 300, 200
# What things take, in seconds: a hit, to encode a user, to read a row that is not in memory.
HIT, ENCODE, READ = 4e-3, 20e-3, 80e-6
# Users that come, how unevenly; items, how unevenly.
MANY_USERS, MANY_ITEMS = (1200, 0.5, 40_000, 1.2), (200, 0.8, 200_000, 0.5)
WORKLOADS = ("steady", "trend", "burst")


class Reads:
    """A table whose rows take their time, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def rows(self, ids: Array) -> Array:
        self.now += READ * len(ids)
        return np.zeros((len(ids), WIDTH), np.float32)


class Drawn:
    """Users and items by Zipf's law, the frequent ones anywhere among them."""

    def __init__(self, users: int, user_power: float, items: int, item_power: float, rng: np.random.Generator) -> None:
        self._rng, self._users, self._items = rng, users, rng.permutation(MANY_ITEMS[2])[:items]
        of_users, of_items = (1.0 / np.arange(1, n + 1) ** p for n, p in ((users, user_power), (items, item_power)))
        self._of_users, self._of_items = (np.cumsum(x) / x.sum() for x in (of_users, of_items))

    def user(self) -> int:
        return int(np.searchsorted(self._of_users, self._rng.random()))

    def items(self, count: int) -> Array:
        found: Array = self._items[np.searchsorted(self._of_items, self._rng.random(count))]
        return found


def trace(workload: str, requests: int, seed: int) -> Iterator[tuple[int, Array, Array]]:
    """The user, the targets and the history of each request."""
    rng = np.random.default_rng(seed)
    users, items = Drawn(*MANY_USERS, rng), Drawn(*MANY_ITEMS, rng)
    for i in range(requests):
        share = {"steady": 0.5, "trend": 1 - i / requests, "burst": float(i % (requests // 4) < requests // 8)}[
            workload
        ]
        now = users if rng.random() < share else items
        yield now.user(), now.items(TARGETS), now.items(HISTORY)


def main() -> None:
    args = _arguments()
    result: dict[str, Any] = {
        "command": command(),
        "costs": {"hit_s": HIT, "encode_s": ENCODE, "read_s": READ},
        "memory": {"pages": PAGES, "page_bytes": PAGE_BYTES, "state_bytes": STATE_BYTES, "row_bytes": 4 * WIDTH},
        "requests": args.requests,
        "a_second": args.rate,
    }
    for workload in WORKLOADS:
        grid = np.linspace(0.1, 0.7, args.grid).round(3).tolist()
        statics = {share: served(workload, Static(share), args) for share in grid}
        best = min(statics, key=lambda share: statics[share]["p99_ms"])
        adaptive = served(workload, MarginalUtility(), args)
        result[workload] = {
            "best_static_rows_share": best,
            "best_static": statics[best],
            "adaptive": adaptive,
            "p99_less": 1 - adaptive["p99_ms"] / statics[best]["p99_ms"],
            "mean_less": 1 - adaptive["mean_ms"] / statics[best]["mean_ms"],
            "statics_p99_ms": {share: one["p99_ms"] for share, one in statics.items()},
        }
        print(workload, {k: v for k, v in result[workload].items() if k != "statics_p99_ms"}, file=sys.stderr)
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=12_000)
    p.add_argument("--rate", type=float, default=35.0, help="requests a second")
    p.add_argument("--every", type=int, default=50, help="requests between two decisions")
    p.add_argument("--grid", type=int, default=7, help="static splits that are tried")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out")
    return p.parse_args()


def served(workload: str, policy: SplitPolicy, args: argparse.Namespace) -> dict[str, Any]:
    """Latencies of a workload's requests, the first sixth left out."""
    reads, rng = Reads(), np.random.default_rng(args.seed + 1)
    rows = RowCache(
        reads, TableSpec("items", "", "", "float32", MANY_ITEMS[2], WIDTH, 1), PAGE_BYTES, PAGES, clock=reads.clock
    )  # type: ignore[arg-type]
    states = StateCache(0, cost=lambda *_: STATE_BYTES)
    pool = MemoryPool(PAGES, StatePages(states, PAGE_BYTES, PAGES, lambda: ENCODE), policy)
    pool.serve({"items": rows})
    latencies, shares, misses = [], [], 0
    arrives = free = 0.0
    for i, (user, targets, history) in enumerate(trace(workload, args.requests, args.seed)):
        key, began = StateKey(user, 0, "", ""), reads.now
        work = HIT
        if states.get(key) is None:
            misses += 1
            rows.rows(history)
            work += ENCODE
            states.put(key, UserState({}, 0))
        rows.rows(targets)
        work += reads.now - began
        arrives += rng.exponential(1 / args.rate)
        free = max(free, arrives) + work
        latencies.append(free - arrives)
        shares.append(pool.split["items"] / PAGES)
        if i % args.every == 0:
            pool.step()
    kept = np.array(latencies[len(latencies) // 6 :]) * 1e3
    hits, missed = rows.counts
    return {
        "p50_ms": float(np.percentile(kept, 50)),
        "p99_ms": float(np.percentile(kept, 99)),
        "mean_ms": float(kept.mean()),
        "state_hits": 1 - misses / args.requests,
        "row_hits": hits / (hits + missed),
        "rows_share": [float(min(shares)), float(np.mean(shares)), float(max(shares))],
        "moves": pool.moves,
    }


if __name__ == "__main__":
    main()
