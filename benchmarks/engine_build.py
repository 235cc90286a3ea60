"""How long TensorRT-RTX takes to build both halves at production size, on a CPU, and what a cache hit costs.

    python benchmarks/engine_build.py [--out DIR] [--sm 89] [--width 1024 --heads 16 --layers 4 --expansion 1]
        [--eight-bits] [--result FILE]

Exports a model with random weights, builds its engines in each precision for histories up to 10 240 tokens and 512
targets, builds them again, and prints a table and JSON. TensorRT-RTX compiles its kernels on the GPU when an
engine is loaded, so these times are those of parsing, fusing and writing, and say nothing of TensorRT proper. With
`--eight-bits` the state and the matrices are in INT8 or FP8, and all else is in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import outcome

from stca.versions import installed

EIGHT_BITS: Final = ("int8", "int8 token", "int8 tensor", "fp8")


def export(out: Path, width: int, heads: int, layers: int, expansion: int) -> int:
    """A projected bundle with random weights; returns its number of parameters."""
    import torch

    from stca.export.pipeline import export_checkpoint
    from stca.export.reference.checkpoint import Checkpoint
    from stca.export.reference.config import Field, StcaConfig
    from stca.export.reference.module import Stca

    torch.manual_seed(0)
    config = StcaConfig(
        items=20_000,
        tasks=("finish", "skip", "head"),
        item_width=128,
        field_width=32,
        history_fields=(Field("action", 8), Field("category", 500)),
        user_fields=(Field("segment", 100),),
        request_fields=(Field("device", 5),),
        target_fields=(Field("category", 500),),
        width=width,
        heads=heads,
        layers=layers,
        ffn_expansion=expansion,
        mixer_head_width=32,
    )
    tensors = Stca(config).state_dict()
    export_checkpoint(Checkpoint(config, tensors), out, form="projected", prove=lambda *_: {})
    return sum(t.numel() for t in tensors.values())


def in_eight_bits(bundle: Path, out: Path, name: str) -> None:
    """The bundle with its state and matrices in 8 bits: `int8`, by what matrices are multiplied with, or `fp8`."""
    import numpy as np

    from stca import probe
    from stca.bundle import Bundle
    from stca.calibration.choices import Options, formats_of, state_choices, weight_choices, with_ranges
    from stca.calibration.quantized_bundle import write_quantized
    from stca.checks.trace_runs import TraceRuns
    from stca.trace import Traced

    kind, _, activations = name.partition(" ")
    own, runs = Bundle.load(bundle), TraceRuns(1)
    some = [Traced(probe.single(own.manifest.graphs["request"].inputs, 64, 8, np.random.default_rng(0)))]
    options = Options(kind, weights=kind, activations=activations or "none")  # type: ignore[arg-type]
    weights = weight_choices(own, options)
    ranged = with_ranges(own, weights, "absmax", runs, some) if activations == "tensor" else {}
    state = formats_of(own, state_choices(own, options, weights), options, runs.states(own, some))
    write_quantized(own, {**weights, **ranged, **state}, out)


def command(bundle: Path, sm: int, precision: str, cache: Path) -> tuple[list[dict[str, Any]], float, float]:
    """`build` in a fresh process, as a user has it: its result, seconds in all, and peak memory in MB."""
    code = (
        "import json, sys; from pathlib import Path; from stca.engines.build import Workload, build\n"
        "from stca.engines.cache import EngineCache\n"
        "bundle, sm, precision, cache = sys.argv[1:]\n"
        "workload, kept = Workload(history_max=10_240, targets_max=512), EngineCache(Path(cache))\n"
        "asked = {'sm': int(sm), 'precision': precision, 'workload': workload, 'cache': kept}\n"
        "print(json.dumps(build(bundle, engine='tensorrt-rtx', **asked)))"
    )
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(bundle), str(sm), precision, str(cache)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the build in {precision} failed")
    return json.loads(told), time.monotonic() - began, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the bundle goes; a temporary directory by default")
    parser.add_argument("--sm", type=int, default=89)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--expansion", type=int, default=1)
    parser.add_argument("--eight-bits", action="store_true", help="state and matrices in 8 bits, the rest in bfloat16")
    parser.add_argument("--result", type=Path, help="where the JSON goes, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch, "bundle")
        # In a process of its own: a process counts its parent's memory at the fork as its own peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(export, (out, args.width, args.heads, args.layers, args.expansion))
        print(
            f"{parameters / 1e6:.0f} M parameters, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            file=sys.stderr,
        )
        rows = []
        print("| precision | graph | lowering | engine, MB | build, s | command, s | again, s | peak memory, MB |")
        print("|---|---|---|---|---|---|---|---|")
        for name in EIGHT_BITS if args.eight_bits else ("fp32", "fp16", "bf16"):
            source, precision = (Path(scratch, name), "bf16") if args.eight_bits else (out, name)
            if args.eight_bits:
                in_eight_bits(out, source, name)
            built, total, peak = command(source, args.sm, precision, Path(scratch, "cache"))
            again, hit, _ = command(source, args.sm, precision, Path(scratch, "cache"))
            assert [r["cache"] for r in built] == ["miss"] * 2
            assert [r["cache"] for r in again] == ["hit"] * 2
            for r in built:
                cells = [name, r["graph"], r["lowering"] or "–", f"{r['bytes'] / 1e6:.0f}", f"{r['seconds']:.2f}"]
                print("| " + " | ".join([*cells, f"{total:.1f}", f"{hit:.2f}", f"{peak:.0f}"]) + " |", flush=True)
                r["path"] = Path(r["path"]).name
                rows.append({"name": name, **r, "command_seconds": total, "hit_seconds": hit, "peak_mb": peak})
        about = {"command": outcome.command(), "parameters": parameters, "sm": args.sm, "versions": installed()}
        outcome.tell({**about, "engines": rows}, args.result)


if __name__ == "__main__":
    main()
