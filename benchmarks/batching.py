"""What `stca serve` gains by computing together the requests that find no processor free.

    python benchmarks/batching.py BUNDLE --seconds 5 --out benchmarks/results/batching-cpu.json

For each `--batch-tokens` a server of its own, loaded from this process on the same processors: `lone` is one
connection, `crowd` many of them with kept users, `new` many whose users were never seen; in `mixed` two more
connections bring one user's long histories, each of them new, and latencies are those of the short requests;
`mixed_long` are the long ones. `gains` has what batches give over requests one by one, and `fair` how many times longer
the short requests took beside the long ones than alone, by the median. `--short` takes a minute.
`server_cpu_ms` is the server's processor time for a request, which other work on the machine changes little. Every
connection sends its next request when it has its answer. `joined` is without a server: the processor time of hits that
are computed together, and of the same ones by themselves, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from outcome import tell
from serving import Served

from stca import probe
from stca.checks.timing import machine
from stca.load.inputs import Inputs
from stca.load.run import LoadReport, run
from stca.load.traffic import Arrival
from stca.runtime import Request, Session
from stca.runtime.deadline import NEVER

USERS = 256
JOINED = ((20, 5, 8), (100, 20, 2), (100, 20, 8), (300, 50, 3), (500, 20, 2), (1000, 300, 2))


def main() -> None:
    args = _arguments()
    if args.short:
        args.seconds, args.batch_tokens, args.rounds = 1.0, [0, 1024], 3
    joined = _joined(args.bundle, JOINED[:3] if args.short else JOINED)
    rounds = [{str(most): _measured(args, most) for most in args.batch_tokens} for _ in range(args.rounds)]
    traffic = {n: getattr(args, n) for n in ("connections", "history", "targets", "long", "seconds")}
    result = {"bundle": Path(args.bundle).name, "machine": machine(None), "joined": joined, **traffic, "rounds": rounds}
    result |= {"gains": _medians(rounds, _gains), "fair": _medians(rounds, _fair)}
    tell(result, args.out)


def _measured(args: argparse.Namespace, most: int) -> dict[str, Any]:
    served = Served(args.bundle, ["--batch-tokens", str(most), "--queue", "128"], None)
    numbers = iter(range(1 << 30))
    try:
        inputs = Inputs(served.client.manifest, max(args.history, args.long), 0)

        def arrivals(new: bool, tokens: int, targets: int) -> Iterator[Arrival]:
            for number in range(int(args.seconds * 2000)):
                yield Arrival(0.0, USERS + next(numbers) if new else number % USERS, targets, tokens)

        def load(connections: int, *, new: bool = False, tokens: int = args.history) -> dict[str, Any]:
            trace, before = list(arrivals(new, tokens, args.targets)), served.cpu_seconds()
            report = run(served.client, inputs, trace, connections=connections, offline=True, seconds=args.seconds)
            return _told(report, served.cpu_seconds() - before)

        load(4)
        made = {"lone": load(1), "crowd": load(args.connections), "new": load(args.connections, new=True)}
        long: dict[str, Any] = {}
        others = threading.Thread(target=lambda: long.update(load(2, new=True, tokens=args.long)))
        others.start()
        made["mixed"] = load(args.connections)
        others.join()
        made["mixed_long"] = {n: long[n] for n in ("per_second", "latency_ms", "codes")}
        with urllib.request.urlopen(f"{served.url}/v2/models/m/stats") as answer:
            (told,) = json.load(answer)["model_stats"]
        made["requests_by_run"] = {of["batch_size"]: of["compute_infer"]["count"] for of in told["batch_stats"]}
    finally:
        served.process.kill()
    print(most, json.dumps(made), file=sys.stderr, flush=True)
    return made


def _gains(of: dict[str, Any], alone: dict[str, Any]) -> dict[str, float]:
    """Requests a second, as a multiple of those that are computed each by itself."""
    return {n: of[n]["per_second"] / alone[n]["per_second"] for n in ("lone", "crowd", "new", "mixed")}


def _fair(of: dict[str, Any], _: dict[str, Any]) -> dict[str, float]:
    """How many times longer a short request takes beside long ones."""
    return {p: of["mixed"]["latency_ms"][p] / of["crowd"]["latency_ms"][p] for p in ("p50", "p95")}


def _medians(rounds: Sequence[dict[str, Any]], told: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """By batch tokens, the median of what each round told."""
    made = {}
    for most in rounds[0]:
        each = [told(by[most], by.get("0", by[most])) for by in rounds]
        made[most] = {n: round(statistics.median(one[n] for one in each), 2) for n in each[0]}
    return made


def _joined(bundle: str, sizes: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """By history, targets and number of hits: processor time alone and together, in ms, as a batch is computed."""
    session, made = Session.load(bundle, threads=1), []
    specs, model = session.manifest.graphs["request"].inputs, session._model
    for tokens, targets, count in sizes:
        hits = []
        for i in range(count):
            inputs, user = probe.single(specs, tokens, targets, np.random.default_rng(i)), f"{tokens} {i}"
            session.score(Request(inputs, user=user, version=1))
            rest = {n: x for n, x in inputs.items() if n not in model.door.names("user")}
            hits += session._scoring.asked(model, [Request(rest, user=user, version=1)], None)
        alone = _cpu_ms(lambda those=hits: [session._scoring.answer(one, NEVER) for one in those])
        together = _cpu_ms(lambda those=hits: session._scoring._together(those, NEVER))
        made.append(
            {"history": tokens, "targets": targets, "requests": count, "alone_ms": alone, "together_ms": together}
        )
        print(json.dumps(made[-1]), file=sys.stderr, flush=True)
    return made


def _cpu_ms(call: Any) -> float:
    took = []
    for _ in range(15):
        began = time.thread_time()
        call()
        took.append(1e3 * (time.thread_time() - began))
    return round(statistics.median(took), 3)


def _told(report: LoadReport, cpu_seconds: float) -> dict[str, Any]:
    return {
        "per_second": report.answered_per_second,
        "server_cpu_ms": round(1e3 * cpu_seconds / max(1, report.requests), 3),
        "latency_ms": report.latency_ms,
        "codes": report.codes,
    }


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle")
    p.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    p.add_argument("--batch-tokens", type=int, nargs="+", default=[0, 256, 1024, 4096])
    p.add_argument("--rounds", type=int, default=3, help="of all, in turn; gains are their medians")
    p.add_argument("--connections", type=int, default=32)
    p.add_argument("--history", type=int, default=100)
    p.add_argument("--targets", type=int, default=20)
    p.add_argument("--long", type=int, default=10_000)
    p.add_argument("--short", action="store_true", help="three rounds of a second each, with 0 and 1024 batch tokens")
    p.add_argument("--out")
    return p.parse_args()


if __name__ == "__main__":
    main()
