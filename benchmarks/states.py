"""What kept states gain and cost: hits, appends, files, traffic with and without them, states made ahead.

    python benchmarks/states.py --threads 1 --out benchmarks/results/NAME.json

A model of the given size with random weights is exported and served by a `Session` on ONNX Runtime. What is compared
takes turns in one run, and the best of the rounds is told beside the median, because what else the machine does only
ever adds time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from outcome import command, tell
from random_model import add_size, random_bundle

from stca import probe
from stca.arrays import Array
from stca.checks.timing import machine
from stca.runtime import Request, Session


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(args, Path(folder), args.history)
        result: dict[str, Any] = {
            "command": command(),
            "machine": machine(args.threads),
            "config": bundle.manifest.model["config"],
            "state_bytes_per_token": bundle.manifest.split["bytes_per_token"],
            "history": args.history,
            "targets": args.targets,
        }
        for name in args.parts:
            measure = {"one_user": _one_user, "traffic": _traffic, "ahead": _ahead}[name]
            result[name] = measure(bundle.path, Path(folder, "states"), args)
            print(name, json.dumps(result[name], indent=1), file=sys.stderr)
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", type=lambda s: s.split(","), default=["one_user", "traffic", "ahead"])
    add_size(p)
    p.add_argument("--history", type=int, default=10_000)
    p.add_argument("--targets", type=int, default=300)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--users", type=int, default=40, help="of the traffic; memory has room for half of their states")
    p.add_argument("--requests", type=int, default=200, help="of the traffic")
    p.add_argument("--traffic-history", type=int, default=1000)
    p.add_argument("--traffic-targets", type=int, default=30, help="of the first requests, too")
    p.add_argument("--ahead-history", type=int, default=250, help="one that is encoded within the recall, or nearly")
    p.add_argument("--recall-ms", type=float, default=30.0)
    p.add_argument("--threads", type=int)
    p.add_argument("--out")
    return p.parse_args()


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _told(times: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        name: {"best_ms": min(t) * 1e3, "median_ms": statistics.median(t) * 1e3, "n": len(t)}
        for name, t in times.items()
    }


def _events(session: Session, inputs: Mapping[str, Array], begin: int, end: int) -> dict[str, Array]:
    specs = session.manifest.graphs["request"].inputs
    names = [s.name for s in specs if s.scope == "user" and s.shape[:1] == ("N_h",)]
    return {n: inputs[n][begin:end] for n in names}


def _one_user(bundle: Path, states: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A miss, hits in memory and from a file, and appends of ten events: in place, into a new room, and to little."""
    session = Session.load(bundle, threads=args.threads, cache_bytes=1 << 33, state_folder=states)
    specs, rng = session.manifest.graphs["request"].inputs, np.random.default_rng(0)
    inputs = probe.single(specs, args.history, args.targets, rng)
    few = {**inputs, **_events(session, inputs, 0, 10)}
    ten = _events(session, inputs, 0, 10)
    store = session._store
    assert store.file is not None
    names = ("miss", "hit", "hit_after_append", "hit_from_file", "append_10", "append_10_moving", "append_10_to_10")
    times: dict[str, list[float]] = {name: [] for name in names}
    written = dict.fromkeys(("append_10", "append_10_moving"), 0)
    session.score(Request(inputs, "u", 0))
    for _ in range(args.rounds):
        session.forget("u")
        times["miss"].append(_seconds(lambda: session.score(Request(inputs, "u", 0))))
        times["hit"].append(_seconds(lambda: session.score(Request(inputs, "u", 0))))
        store.file.wait(60)
        store.memory.clear()
        times["hit_from_file"].append(_seconds(lambda: session.score(Request(inputs, "u", 0))))
        for version, name in ((1, "append_10_moving"), (2, "append_10"), (3, "append_10")):
            before = session.stats().appended_bytes
            times[name].append(_seconds(lambda version=version: session.append("u", ten, version)))  # type: ignore[misc]
            written[name] = session.stats().appended_bytes - before
            store.file.wait(60)
        times["hit_after_append"].append(_seconds(lambda: session.score(Request(inputs, "u", 3))))
        session.score(Request(few, "v", 0))
        session.append("v", ten, 1)
        times["append_10_to_10"].append(_seconds(lambda: session.append("v", ten, 2)))
        session.forget("v")
    held = store.find("u")
    assert held is not None
    session.close()
    best = {name: min(t) for name, t in times.items()}
    return {
        "times": _told(times),
        "state_bytes": held[1].row_bytes,
        "bytes_written_by_append_10": written,
        "miss_over_hit": best["miss"] / best["hit"],
        "file_hit_over_hit": best["hit_from_file"] / best["hit"],
        "hit_after_append_over_hit": best["hit_after_append"] / best["hit"],
        "append_10_beyond_fixed_over_miss": (best["append_10"] - best["append_10_to_10"]) / best["miss"],
        "append_10_moving_over_append_10": best["append_10_moving"] / best["append_10"],
    }


def _traffic(bundle: Path, states: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One caller, users who return by Zipf's law: with room for half the states, for none, and with files besides."""
    rng = np.random.default_rng(1)
    order = np.minimum(rng.zipf(1.2, 20 * args.requests), 10**6)
    asked = order[order <= args.users][: args.requests].tolist()
    plain = Session.load(bundle, threads=args.threads, cache_bytes=1 << 33)
    specs = plain.manifest.graphs["request"].inputs
    requests = [
        Request(probe.single(specs, args.traffic_history, args.traffic_targets, rng), user, 0)
        for user in range(args.users + 1)
    ]
    plain.score(requests[0])
    room = plain.stats().bytes * args.users // 2
    result: dict[str, Any] = {"users": args.users, "requests": len(asked), "bytes_for_half": room}
    options = {"without": {"cache_bytes": 0}, "half": {"cache_bytes": room}, "half_and_files": {"cache_bytes": room}}
    for name, more in options.items():
        folder = states.with_name("traffic") if name == "half_and_files" else None
        with Session.load(bundle, threads=args.threads, state_folder=folder, **more) as session:
            session.score(requests[0])
            seconds = _seconds(lambda session=session: [session.score(requests[u]) for u in asked])  # type: ignore[misc]
            stats = session.stats()
        result[name] = {
            "requests_per_second": len(asked) / seconds,
            "hits_from": dict(stats.hits_from),
            "misses_for": dict(stats.misses_for),
            "most_bytes": stats.bytes,
        }
    for name in ("half", "half_and_files"):
        result[name]["over_without"] = result[name]["requests_per_second"] / result["without"]["requests_per_second"]
    return result


def _ahead(bundle: Path, _: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Latency of a new user's first request after a recall, with the state made ahead during it and without."""
    session = Session.load(bundle, threads=args.threads)
    specs, rng = session.manifest.graphs["request"].inputs, np.random.default_rng(2)
    inputs = probe.single(specs, args.ahead_history, args.traffic_targets, rng)
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(2 * 100):
        name = ("with", "without")[number % 2]
        thread = threading.Thread(target=lambda: session.warm("u", inputs, 0)) if name == "with" else None
        if thread is not None:
            thread.start()
        time.sleep(args.recall_ms / 1e3)
        times[name].append(_seconds(lambda: session.score(Request(inputs, "u", 0))))
        if thread is not None:
            thread.join()
        session.forget("u")
    p99 = {name: float(np.percentile(t, 99)) * 1e3 for name, t in times.items()}
    p50 = {name: float(np.percentile(t, 50)) * 1e3 for name, t in times.items()}
    return {
        "history": args.ahead_history,
        "recall_ms": args.recall_ms,
        "p50_ms": p50,
        "p99_ms": p99,
        "without_over_with_p99": p99["without"] / p99["with"],
        "without_over_with_p50": p50["without"] / p50["with"],
    }


if __name__ == "__main__":
    main()
