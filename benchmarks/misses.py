"""What it gains to encode the misses of a batch together, and from which history length on it gains nothing.

    python benchmarks/misses.py --out benchmarks/results/NAME.json

A model of the given size with random weights is exported, and batches of users without a kept state are scored by a
`Session` on ONNX Runtime, which keeps their states: each user encoded on its own, and together up to several limits on
the tokens of one run. The ways take turns, so that the machine's drift meets all of them. `together` is the limit that
`Session` has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcome import command, tell
from random_model import add_size, random_bundle

import stca.runtime.model
from stca import probe
from stca.checks.timing import machine
from stca.runtime import RequestBatch, Session


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(args, Path(folder), max(tokens for _, tokens in args.batches))
        session = Session.load(bundle.path, threads=args.threads, cache_bytes=1 << 40)
        split = bundle.manifest.split
        result = {
            "command": command(),
            "machine": machine(args.threads),
            "engines": dict(session.engines),
            "config": bundle.manifest.model["config"],
            "mflop_per_token": (split["user_work"] - split["recomputed_work"]) / split["workload"]["N_h"] / 1e6,
            "state_bytes_per_token": split["bytes_per_token"],
            "together": stca.runtime.model._TOKENS_TOGETHER,
            "rows": [_row(session, users, tokens, args) for users, tokens in args.batches],
        }
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    def batches(text: str) -> list[tuple[int, int]]:
        return [(int(users), int(tokens)) for users, _, tokens in (pair.partition("x") for pair in text.split(","))]

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(p)
    p.add_argument("--batches", type=batches, default=batches("32x10,32x50,32x100,32x200,16x500,8x1000,4x10000"))
    p.add_argument("--limits", type=lambda s: [int(n) for n in s.split(",")], default=[256, 512, 1024, 1 << 30])
    p.add_argument("--targets", type=int, default=1, help="of each user; one, so that encoding is what is measured")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--threads", type=int)
    p.add_argument("--out")
    return p.parse_args()


def _row(session: Session, users: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Best time of each way, and how many times as fast it is as one user at a time.

    The best of many rounds, because what else runs on the machine only ever adds time; and processor time besides the
    clock's, because that does not count the others' turns. With one thread it is the steadier of the two.
    """
    specs, rng = session.manifest.graphs["request"].inputs, np.random.default_rng(0)
    inputs = probe.pack(specs, [probe.single(specs, tokens, args.targets, rng) for _ in range(users)])
    batch = RequestBatch(inputs, users=range(users), versions=[0] * users)

    def score(limit: int) -> tuple[float, float]:
        stca.runtime.model._TOKENS_TOGETHER = limit  # type: ignore[misc]
        for user in batch.users:
            session.forget(user)
        start = time.perf_counter(), time.process_time()
        session.score(batch)
        return time.perf_counter() - start[0], time.process_time() - start[1]

    own = stca.runtime.model._TOKENS_TOGETHER
    limits = {0: "one at a time", **{n: f"up to {n} tokens" for n in args.limits}}
    times: dict[int, list[tuple[float, float]]] = {limit: [] for limit in limits}
    for _ in range(args.rounds):
        for limit, measured in times.items():
            score(limit)  # so that each way finds the memory as it leaves it
            measured.append(score(limit))
    stca.runtime.model._TOKENS_TOGETHER = own  # type: ignore[misc]
    row: dict[str, Any] = {"users": users, "tokens": tokens, "rounds": args.rounds}
    for which, name in enumerate(("clock", "processor")):
        best = {limits[limit]: min(t[which] for t in measured) * 1e3 for limit, measured in times.items()}
        row[name] = {"best_ms": best, "times_as_fast": {way: best["one at a time"] / t for way, t in best.items()}}
        print(f"{users} x {tokens}, {name}: {row[name]['times_as_fast']}", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
