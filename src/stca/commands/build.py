"""`stca build`: engines of both halves, written into the bundle."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stca.bundle import require_folder, require_writable
from stca.commands.options import ENGINES, PRECISIONS, count, emit, memory, size, sizes, sm
from stca.commands.progress import progress_on_stderr

HELP = "engines of both halves, written into the bundle"
EXAMPLES = (
    "stca build bundle --engine onnxruntime",
    "stca build bundle --engine tensorrt-rtx --sm 89 --precision bf16 --history-buckets 512,2048,10000",
    "stca build bundle --engine tensorrt-rtx --sm 89 --dry-run",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument("--engine", choices=ENGINES, required=True, help="library that will run it")
    p.add_argument(
        "--sm",
        type=sm,
        metavar="NN",
        help="compute capability to build for, 89 or 8.9 (default: that of the GPU here)",
    )
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of weights and arithmetic")
    p.add_argument(
        "--lowering",
        choices=("function", "plugin", "quick", "fused", "decomposed"),
        help="how the operator gets in (default: the engine's own way)",
    )
    p.add_argument("--history-max", type=count, metavar="N", help="most history tokens (default: the bundle's limit)")
    p.add_argument("--targets-max", type=count, default=512, metavar="N", help="most targets")
    p.add_argument("--requests-max", type=count, default=1, metavar="N", help="most requests of a batch")
    p.add_argument("--history-buckets", type=sizes, default=[], metavar="N,N", help="a profile for each range up to N")
    p.add_argument("--size", action="append", type=size, default=[], metavar="DIM=N", help="most of any other size")
    p.add_argument(
        "--refit",
        choices=("none", "identical", "weights"),
        help="can finished engines take new weights (default: what the engine can)",
    )
    p.add_argument("--provider", default="CPUExecutionProvider", help="execution provider of --engine onnxruntime")
    p.add_argument("--no-cache", action="store_true", help="keep no copy of built engines outside the bundle")
    p.add_argument("--dry-run", action="store_true", help="build nothing; say what would be built, and its memory")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_folder(args.bundle)
    if not args.dry_run:
        require_writable(Path(args.bundle).resolve())
    progress = progress_on_stderr("torch and onnx")
    from stca.engines.build import Workload, build
    from stca.engines.cache import EngineCache

    workload = Workload(
        args.history_max, args.targets_max, args.requests_max, tuple(args.history_buckets), dict(args.size)
    )
    engines = build(
        args.bundle,
        engine=args.engine,
        sm=args.sm,
        precision=args.precision,
        lowering=args.lowering,
        workload=workload,
        refit=args.refit,
        provider=args.provider,
        cache=None if args.no_cache else EngineCache.default(),
        dry_run=args.dry_run,
        progress=progress,
    )
    lines = [
        f"{e['graph']}: {e['path']}, {_said(e, dry_run=args.dry_run)}"
        + (f"; {memory(e['memory'])}" if e.get("memory") else "")
        for e in engines
    ]
    emit(args, {"engines": engines}, "\n".join(lines))
    return 0


def _said(entry: Mapping[str, Any], *, dry_run: bool) -> str:
    """Where the engine came from."""
    if entry["cache"] == "hit":
        return "from the engine cache" if "bundle" not in entry["why"] else "was in the bundle"
    return "would be built" if dry_run else "built"
