"""What it takes to read the kept states of eight neighbours beside the user's own, and one history as long.

    python benchmarks/neighbours.py --out benchmarks/results/NAME.json

The reference model with random weights, through `Session` on ONNX Runtime. All states are kept. `in_place` is a request
that names its neighbours, of a bundle that was exported with `--neighbours`: each state is read where it lies. `joined`
is the same of a bundle that was not: the states are copied behind the user's own. `one` is a request whose user has as
many events alone. All three in turn, in one run. `states_are_read_by` are the operators that read states in the graph
that ONNX Runtime executes after its own rewrites: of these, `Shape` and products of matrices copy nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from outcome import command, tell
from random_model import add_size, random_bundle

from stca import probe
from stca.checks.timing import machine, measure_in_turn
from stca.export.analysis.scope import walk
from stca.pieces import PIECES
from stca.runtime import Request, Session


def main() -> None:
    args = _arguments()
    tokens = args.history * (args.neighbours + 1)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            name: Session.load(
                random_bundle(args, Path(folder), tokens, pieces).path, threads=args.threads, cache_bytes=1 << 33
            )
            for name, pieces in (("in_place", args.neighbours + 1), ("joined", 1))
        }
        manifest = sessions["in_place"].manifest
        specs = manifest.graphs["request"].inputs
        whole = probe.single(specs, tokens, args.targets, np.random.default_rng(0))
        targets = {s.name: whole[s.name] for s in specs if s.scope != "user" and s.name in whole}
        user = {n: x for n, x in whole.items() if n not in targets}
        for session in sessions.values():
            for i in range(args.neighbours + 1):
                rows = slice(i * args.history, (i + 1) * args.history)
                session.warm(f"user {i}", {n: x[rows] if len(x) == tokens else x for n, x in user.items()}, 0)
        sessions["joined"].warm("one", user, 0)
        neighbours = [Request({}, f"user {i}", 0) for i in range(1, args.neighbours + 1)]
        asked = {name: (session, Request(targets, "user 0", 0, neighbours)) for name, session in sessions.items()}
        asked["one"] = (sessions["joined"], Request(targets, "one", 0))
        found = {name: session.answer(request) for name, (session, request) in asked.items()}
        assert all(one.hits == (True,) and {"hit"} >= {*sum(one.neighbours, ())} for one in found.values())
        calls = {name: lambda of=of: of[0].score(of[1]) for name, of in asked.items()}
        taken = measure_in_turn(calls, args.seconds)
        medians, least = ({n: float(f(t)) * 1e3 for n, t in taken.items()} for f in (np.median, np.min))
        scorer = Path(folder) / f"bundle-{args.neighbours + 1}" / f"{PIECES}.onnx"
        result: dict[str, Any] = {
            "command": command(),
            "machine": machine(args.threads),
            "config": manifest.model["config"],
            "tokens": tokens,
            "targets": args.targets,
            "ms": medians,
            "least_ms": least,
            "calls": {n: len(t) for n, t in taken.items()},
            "over_one": {n: medians[n] / medians["one"] for n in sessions},
            "least_over_one": {n: least[n] / least["one"] for n in sessions},
            "copied_bytes": {n: one.copied for n, one in found.items()},
            "states_are_read_by": readers(scorer, {s.name for s in manifest.state if s.bytes_per_token}),
            "most_apart": {n: float(np.abs(found[n].scores - found["one"].scores).max()) for n in sessions},
        }
    tell(result, args.out)


def readers(scorer: Path, states: set[str]) -> list[str]:
    """Operators that read any piece of these inputs in the graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(scorer.with_name("executed.onnx"))
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "executed.bin")
    ort.InferenceSession(str(scorer), options, providers=["CPUExecutionProvider"])
    executed = onnx.load(options.optimized_model_filepath, load_external_data=False)
    read = (n.op_type for n in walk(executed.graph.node) if {x.split("@")[0] for x in n.input} & states)
    return sorted(set(read))


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
