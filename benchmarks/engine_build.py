"""How long TensorRT-RTX takes to build both halves at production size, on a CPU, and what a cache hit costs.

    python benchmarks/engine_build.py [--out DIR] [--sm 89] [--width 1024 --heads 16 --layers 4 --expansion 1]

Exports a model with random weights, builds its engines in each precision for histories up to 10 240 tokens and 512
targets, builds them again, and prints a table and one JSON line. TensorRT-RTX compiles its kernels on the GPU when an
engine is loaded, so these times are those of parsing, fusing and writing, and say nothing of TensorRT proper.
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
from typing import Any


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
        for precision in ("fp32", "fp16", "bf16"):
            built, total, peak = command(out, args.sm, precision, Path(scratch, "cache"))
            again, hit, _ = command(out, args.sm, precision, Path(scratch, "cache"))
            assert [r["cache"] for r in built] == ["miss"] * 2
            assert [r["cache"] for r in again] == ["hit"] * 2
            for r in built:
                cells = [precision, r["graph"], r["lowering"] or "–", f"{r['bytes'] / 1e6:.0f}", f"{r['seconds']:.2f}"]
                print("| " + " | ".join([*cells, f"{total:.1f}", f"{hit:.2f}", f"{peak:.0f}"]) + " |", flush=True)
                rows.append({**r, "command_seconds": total, "hit_seconds": hit, "peak_mb": peak})
        print(json.dumps({"parameters": parameters, "sm": args.sm, "engines": rows}))


if __name__ == "__main__":
    main()
