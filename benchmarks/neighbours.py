"""What it takes to read the kept states of eight neighbours behind the user's own, beside one history as long.

    python benchmarks/neighbours.py --out benchmarks/results/NAME.json

The reference model with random weights, through `Session` on ONNX Runtime. All states are kept. `joined` is a request
that names its neighbours: their states are copied behind the user's own. `one` is a request whose user has as many
events alone; nothing is copied for it. Both in turn, in one run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from outcome import command, tell
from random_model import add_size, random_bundle

from stca import probe
from stca.checks.timing import machine, measure_in_turn
from stca.runtime import Request, Session


def main() -> None:
    args = _arguments()
    tokens = args.history * (args.neighbours + 1)
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(args, Path(folder), tokens)
        session = Session.load(bundle.path, threads=args.threads, cache_bytes=1 << 33)
        specs = bundle.manifest.graphs["request"].inputs
        whole = probe.single(specs, tokens, args.targets, np.random.default_rng(0))
        targets = {s.name: whole[s.name] for s in specs if s.scope != "user" and s.name in whole}
        user = {n: x for n, x in whole.items() if n not in targets}
        for i in range(args.neighbours + 1):
            rows = slice(i * args.history, (i + 1) * args.history)
            session.warm(f"user {i}", {n: x[rows] if len(x) == tokens else x for n, x in user.items()}, 0)
        session.warm("one", user, 0)
        neighbours = [Request({}, f"user {i}", 0) for i in range(1, args.neighbours + 1)]
        joined, one = Request(targets, "user 0", 0, neighbours), Request(targets, "one", 0)
        found, alone = session.answer(joined), session.answer(one)
        assert found.hits == alone.hits == (True,)
        assert set(found.neighbours[0]) == {"hit"}
        calls = {"joined": lambda: session.score(joined), "one": lambda: session.score(one)}
        taken = measure_in_turn(calls, args.seconds)
        medians = {n: float(np.median(t)) * 1e3 for n, t in taken.items()}
        least = {n: float(np.min(t)) * 1e3 for n, t in taken.items()}
        result: dict[str, Any] = {
            "command": command(),
            "machine": machine(args.threads),
            "config": bundle.manifest.model["config"],
            "tokens": tokens,
            "targets": args.targets,
            "ms": medians,
            "least_ms": least,
            "calls": {n: len(t) for n, t in taken.items()},
            "joined_over_one": medians["joined"] / medians["one"],
            "least_joined_over_one": least["joined"] / least["one"],
            "copied_bytes": found.copied,
            "most_apart": float(np.abs(found.scores - alone.scores).max()),
        }
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(p)
    p.add_argument("--history", type=int, default=1000, help="events of each user")
    p.add_argument("--neighbours", type=int, default=8)
    p.add_argument("--targets", type=int, default=300)
    p.add_argument("--seconds", type=float, default=15.0, help="of measuring each")
    p.add_argument("--threads", type=int)
    p.add_argument("--out")
    return p.parse_args()


if __name__ == "__main__":
    main()
