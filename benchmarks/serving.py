"""`stca serve` under users' traffic on loopback: steady, overloaded, while bundles are swapped, and told to end.

    python benchmarks/serving.py BUNDLE --seconds 60 --out benchmarks/results/serving-cpu.json

The server is a process of its own, and the clients are this one, on the same processors: what they take, it lacks.
With `--apart`, the server has the first processor to itself, and the clients have the others.
Latencies count from the moment each request was due, and users are known when a run begins. `steady` runs at 80 % of
the capacity that was measured first, with the memory at a third of the time and at its end; `overload` at three
times the capacity, with a deadline; `swaps` at half of it, while the bundle is replaced by itself every 5 seconds;
`ending` is told to end by SIGTERM. Events make histories longer, and hits dearer, up to the bundle's limit: a long
steady run wants `--history N,N` and a bundle of `stca export --max-history N`, whose histories stay as long.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from outcome import tell

from stca.checks.timing import machine
from stca.load.clients import Behind
from stca.load.inputs import Inputs
from stca.load.run import LoadReport, capacity, run
from stca.load.traffic import Arrival, Traffic

CONNECTIONS = 128
SWAP_SECONDS = 5.0


class Served:
    """The server's process, and its admin port as a client."""

    def __init__(self, bundle: str, options: list[str], on: set[int] | None) -> None:
        self.bundle = bundle
        all_ = os.sched_getaffinity(0)
        os.sched_setaffinity(0, on or all_)  # the server's threads inherit it
        ports = [f for p in ("http", "grpc", "admin") for f in (f"--{p}-port", "0")]
        command = [sys.executable, "-m", "stca", "serve", f"m={bundle}", *ports, "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        os.sched_setaffinity(0, all_ - (on or set()))
        assert self.process.stdout
        ports_ = json.loads(self.process.stdout.readline())["ports"]
        self.url, self.admin = (f"http://127.0.0.1:{ports_[p]}" for p in ("http", "admin"))
        self.client = Behind(self.url, self.admin)

    def memory(self) -> int:
        """Bytes that are resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) << 10

    def cpu_seconds(self) -> float:
        """Processor time that it took so far, its own and the system's for it."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def state_bytes(self) -> int:
        """Bytes of its states, room for rows to come included."""
        with urllib.request.urlopen(f"{self.admin}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("stca_state_bytes{")))

    def swap(self) -> bool:
        """Replace the bundle by itself; whether that was done."""
        return bool(self.client.change("swap", {"bundle": self.bundle}))


def main() -> None:
    args = _arguments()
    traffic = Traffic(users=args.users, history=args.history, targets=args.targets, events=1.0)
    options = ["--queue", str(args.queue), "--cache-mib", str(args.cache_mib), "--truncate"]
    served = Served(args.bundle, options, {min(os.sched_getaffinity(0))} if args.apart else None)
    try:
        found = _measured(args, served, traffic)
    finally:
        served.process.kill()
    tell(found, args.out)


def _measured(args: argparse.Namespace, served: Served, traffic: Traffic) -> dict[str, Any]:
    def trace(rate: float, seconds: float, seed: int) -> list[Arrival]:
        return dataclasses.replace(traffic, seed=seed).trace(rate, seconds)

    def load(made: list[Arrival], **more: Any) -> LoadReport:
        inputs = Inputs(served.client.manifest, max(a.tokens for a in made), 0)
        run(served.client, inputs, _known(made), connections=2, offline=True)
        return run(served.client, inputs, made, connections=CONNECTIONS, **more)

    probing = trace(2000.0, 20.0, 1)
    inputs = Inputs(served.client.manifest, max(a.tokens for a in probing), 0)
    most = capacity(served.client, inputs, probing, 4, min(10.0, args.seconds / 3))
    print(f"capacity {most:.1f}/s", file=sys.stderr, flush=True)
    short = args.seconds / 4
    found: dict[str, Any] = {}
    if "steady" in args.runs:
        steady, memory = _watched(served, args.seconds, lambda: load(trace(0.8 * most, args.seconds, 2)))
        over = steady.latency_ms["p99"] / steady.latency_ms["p50"]
        found["steady"] = {**_told(steady), "p99_over_p50": over, **memory}
    if "overload" in args.runs:
        overload = load(trace(3 * most, short, 3), deadline_ms=args.deadline_ms)
        found["overload"] = {**_told(overload), "goodput_of_capacity": overload.goodput_per_second / most}
    if "swaps" in args.runs:
        swaps, done = _swapped(served, lambda: load(trace(0.5 * most, max(short, 3 * SWAP_SECONDS), 4)))
        found["swaps"] = {**_told(swaps), "swaps": done}
    if "ending" in args.runs:
        ending, code, took = _ended(served, 8.0, lambda: load(trace(0.8 * most, 10.0, 5)))
        found["ending"] = {**_told(ending), "exit_code": code, "seconds_from_sigterm": took}
    return {
        "bundle": Path(args.bundle).name,
        "machine": machine(None),
        "traffic": dataclasses.asdict(traffic),
        "queue": args.queue,
        "cache_mib": args.cache_mib,
        "apart": args.apart,
        "capacity_per_second": most,
        **found,
    }


def _known(made: list[Arrival]) -> list[Arrival]:
    """A request of each user with the history that they have when the trace begins, so that the store is not empty."""
    first: dict[int, Arrival] = {}
    for arrival in made:
        first.setdefault(arrival.user, Arrival(0.0, arrival.user, 1, arrival.tokens - arrival.events))
    return list(first.values())


def _told(report: LoadReport) -> dict[str, Any]:
    return {n: x for n, x in dataclasses.asdict(report).items() if n not in ("store", "left", "scenario")}


def _watched(served: Served, seconds: float, load: Any) -> tuple[LoadReport, dict[str, Any]]:
    """The run, the processors' time that it took, and the server's memory a third of the time into it and at its end:
    all of it, and what is not accounted for by states.
    """
    at: list[tuple[int, int]] = []
    timer = threading.Timer(seconds / 3, lambda: at.append((served.memory(), served.state_bytes())))
    timer.start()
    before = served.cpu_seconds(), time.process_time()
    found = load()
    took = served.cpu_seconds() - before[0], time.process_time() - before[1]
    timer.join()
    at.append((served.memory(), served.state_bytes()))
    (early, early_states), (late, late_states) = at
    return found, {
        "server_cpu_seconds": round(took[0], 2),
        "clients_cpu_seconds": round(took[1], 2),
        "memory_bytes": [early, late],
        "state_bytes": [early_states, late_states],
        "memory_drift": late / early - 1,
        "memory_drift_beside_states": (late - late_states) / (early - early_states) - 1,
    }


def _swapped(served: Served, load: Any) -> tuple[LoadReport, int]:
    """The run, and how many swaps were done meanwhile."""
    ended, done = threading.Event(), []

    def swaps() -> None:
        while not ended.wait(SWAP_SECONDS):
            done.append(served.swap())

    thread = threading.Thread(target=swaps)
    thread.start()
    found = load()
    ended.set()
    thread.join()
    return found, sum(done)


def _ended(served: Served, seconds: float, load: Any) -> tuple[LoadReport, int, float]:
    """A run in whose middle the server is told to end, its exit code, and how long it took from then on."""
    told: list[float] = []

    def end() -> None:
        told.append(time.monotonic())
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)
        told.append(time.monotonic())

    timer = threading.Timer(seconds, end)
    timer.start()
    found = load()
    timer.join()
    return found, served.process.returncode, told[1] - told[0]


def _arguments() -> argparse.Namespace:
    def pair(text: str) -> tuple[int, int]:
        low, _, high = text.partition(",")
        return int(low), int(high)

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle")
    p.add_argument("--seconds", type=float, default=60.0, help="of the steady run; the others are shorter")
    p.add_argument("--users", type=int, default=200)
    p.add_argument("--history", type=pair, default=(200, 2000))
    p.add_argument("--targets", type=pair, default=(100, 300))
    p.add_argument("--queue", type=int, default=16)
    p.add_argument("--cache-mib", type=int, default=1024)
    p.add_argument("--deadline-ms", type=float, default=1000.0)
    p.add_argument("--runs", type=lambda t: t.split(","), default=["steady", "overload", "swaps", "ending"])
    p.add_argument(
        "--apart", action="store_true", help="the server on the first processor alone, clients on the others"
    )
    p.add_argument("--out")
    return p.parse_args()


if __name__ == "__main__":
    main()
