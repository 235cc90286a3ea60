"""How many requests a second one core takes through the C++ runtime's door and into a ragged batch.

    python benchmarks/cpp_runtime.py [--history 10000] [--targets 300] [--seconds 5] [--out FILE]

Builds the library with optimisation, writes a bundle with the reference model's inputs, and scores requests whose
history is cached, with an engine that computes nothing: what is timed is validation, the look-up of the state, packing,
and the call itself. One thread, pinned to one core. Rates are per second of processor time, so that other work on the
machine disturbs them little; those per second of wall time are printed beside them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from outcome import tell

from stca.bundle import sha256_of, writing
from stca.checks.timing import machine
from stca.manifest import WEIGHTS, Manifest
from stca.specs import GraphSpec, StateSpec, TensorSpec

REPOSITORY = Path(__file__).resolve().parents[1]
USER = (
    *(
        TensorSpec(f"history_{name}", "int64", ("N_h",), "user", limit)
        for name, limit in (("item", 5_000_000), ("action", 8), ("category", 300), ("time", None), ("gap", None))
    ),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("user_segment", "int64", ("B",), "user", 50),
)
REST = (
    TensorSpec("request_device", "int64", ("B",), "request", 10),
    TensorSpec("target_item", "int64", ("N_t",), "target", 5_000_000),
    TensorSpec("target_category", "int64", ("N_t",), "target", 300),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)


def write_bundle(path: Path, width: int) -> None:
    """A bundle that declares a one-layer absorbed state of `width` bfloat16 numbers a token; its graphs are empty."""
    state = (
        StateSpec("state_layer_0", "bfloat16", ("N_h", width), 2 * width),
        StateSpec("state_history_offsets", "int32", ("B_plus_1",), 0, "history_offsets"),
        StateSpec("state_user_segment", "int64", ("B",), 0, "user_segment"),
    )
    states = tuple(TensorSpec(s.name, s.dtype, s.shape) for s in state)
    scores = (TensorSpec("scores", "float32", ("N_t", 2)),)
    graphs = {
        "request": GraphSpec("request.onnx", (*USER, *REST), scores),
        "user_encoder": GraphSpec("user_encoder.onnx", USER, states),
        "target_scorer": GraphSpec("target_scorer.onnx", (*states, *REST), scores),
    }
    with writing(path) as (work, commit):
        for name in (WEIGHTS, *(g.file for g in graphs.values())):
            (work / name).write_bytes(b"")
        commit(
            Manifest(
                model={"kind": "onnx"},
                weights=sha256_of(work / WEIGHTS),
                precision="bfloat16",
                attention="absorbed",
                graphs=graphs,
                state=state,
                appendable=True,
                max_history=None,
                split={},
                parity={},
                producer={},
            )
        )


def build(folder: Path) -> Path:
    """Build the benchmark program and return its path."""
    configure = ["cmake", "-S", REPOSITORY / "runtime" / "cpp", "-B", folder, "-DSTCA_BUILD_BENCHMARKS=ON"]
    for arguments in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        subprocess.run(list(map(str, arguments)), check=True, stdout=sys.stderr)
    return folder / "stca_benchmark"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=int, default=10_000, help="tokens of each user's cached history")
    parser.add_argument("--targets", type=int, default=300, help="targets of each request")
    parser.add_argument("--width", type=int, default=64, help="bfloat16 numbers of state a token")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--seconds", type=float, default=5.0, help="processor seconds for each row")
    arguments = parser.parse_args()
    about = {**machine(1), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder) / "build")
        write_bundle(Path(folder) / "bundle", arguments.width)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        sizes = [str(arguments.history), str(arguments.targets), str(arguments.seconds)]
        done = subprocess.run([program, Path(folder) / "bundle", *sizes], check=True, stdout=subprocess.PIPE, text=True)
    asked = {"history": arguments.history, "targets": arguments.targets, "machine": about}
    tell({**asked, **json.loads(done.stdout)}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
