"""What a session adds to its engines: a hit against the bare target scorer, a miss against both halves bare.

    python benchmarks/host_overhead.py [--sizes 20x5,100x20,500x100] [--out FILE]

The shipped checkpoint on ONNX Runtime, at sizes so small that what a session does besides computing shows. `scorer` and
`encoder` are `onnxruntime.InferenceSession.run` alone, of the very graphs and settings that the session runs, with
inputs made before. A hit is a request without history of a user whose state is kept; a miss is one with a history and a
version that is new, and its state takes the place of the one before.

Each round calls each way once, in an order drawn anew: in a loop of its own, a bare run would find all it needs in the
processor's nearest cache, which no server's does. What is compared are medians of one thread's processor time, so that
others on the machine count little. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from outcome import tell

from stca import probe
from stca.checks.timing import machine
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import load_checkpoint
from stca.report.demo import shipped_checkpoint
from stca.runtime import OnnxRuntimeEngine, Request, Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = "20x5,100x20,500x100"
    parser.add_argument("--sizes", default=sizes, help="history x targets of each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3000, help="calls of each way (%(default)s)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(shipped_checkpoint())
        bundle = export_checkpoint(checkpoint, Path(folder, "B"), prove=lambda *_: {"passed": True})
        with Session.load(bundle.path, engine="graphs", threads=1) as session:
            rows = [_row(session, *map(int, size.split("x")), rounds=args.rounds) for size in args.sizes.split(",")]
            engine = session.engines["target_scorer"]
    load = os.getloadavg()[0]
    tell({"engine": engine, "machine": {**machine(1), "load": load}, "rows": rows}, args.out)


def _row(session: Session, history: int, targets: int, *, rounds: int) -> dict[str, Any]:
    """Median microseconds of each way, and what a session adds to its engines, at one size."""
    specs = session.manifest.graphs["request"].inputs
    whole = probe.single(specs, history, targets, np.random.default_rng(0))
    of_user = {s.name for s in specs if s.scope == "user"}
    hit = Request({name: x for name, x in whole.items() if name not in of_user}, "ann", history)
    session.score(Request(whole, "ann", history))  # a version of its own, or the last size's state would be a hit
    versions = itertools.count()
    encoder, scorer = _bare(session, whole)
    ways: dict[str, Callable[[], object]] = {
        "encoder": encoder,
        "scorer": scorer,
        "hit": lambda: session.score(hit),
        "miss": lambda: session.score(Request(whole, "bob", next(versions))),
    }
    order = random.Random(0)
    times: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(rounds + 100):
        for name in order.sample(list(ways), len(ways)):
            began = time.thread_time_ns()
            ways[name]()
            times[name].append(time.thread_time_ns() - began)
    took = {name: float(np.median(t[100:])) / 1e3 for name, t in times.items()}  # the first ones find all caches cold
    return {
        "history": history,
        "targets": targets,
        "microseconds": {name: round(t, 1) for name, t in took.items()},
        "hit_over_scorer": round(took["hit"] / took["scorer"], 3),
        "miss_over_halves": round(took["miss"] / (took["encoder"] + took["scorer"]), 3),
    }


def _bare(session: Session, whole: Mapping[str, Any]) -> list[Callable[[], object]]:
    """Runs of the session's own engines, by ONNX Runtime's own call."""
    runs: list[Callable[[], object]] = []
    known = dict(probe.pack(session.manifest.graphs["request"].inputs, [whole]))
    for engine in session.loaded_engines():
        assert isinstance(engine, OnnxRuntimeEngine)
        feeds, ort = {name: known[name] for name in engine.inputs}, engine._session
        known |= zip(engine.outputs, ort.run(engine.outputs, feeds), strict=True)
        runs.append(lambda ort=ort, outputs=engine.outputs, feeds=feeds: ort.run(outputs, feeds))
    return runs


if __name__ == "__main__":
    main()
