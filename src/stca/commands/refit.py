"""`stca refit`: new weights into existing graphs and engines."""

from __future__ import annotations

import argparse
from pathlib import Path

from stca.bundle import place_for, require_folder, require_writable
from stca.commands.options import emit, require_file
from stca.commands.progress import progress_on_stderr
from stca.errors import CheckpointError

HELP = "new weights into existing graphs and engines"
EXAMPLES = (
    "stca refit bundle --checkpoint new.safetensors",
    "stca refit bundle --checkpoint new.safetensors --out bundle-2",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument("--checkpoint", required=True, metavar="NEW", help="a checkpoint of the same config")
    p.add_argument("--out", metavar="BUNDLE", help="the new bundle (default: the old one is replaced)")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_folder(args.bundle)
    require_file(args.checkpoint, "checkpoint file", CheckpointError)
    if args.out:
        place_for(args.out)
    else:
        require_writable(Path(args.bundle).resolve())
    progress = progress_on_stderr("torch and onnx")
    from stca.engines.cache import EngineCache
    from stca.engines.refit import refit

    result = refit(args.bundle, args.checkpoint, out=args.out, cache=EngineCache.default(), progress=progress)
    lines = [f"{result['bundle']}: verified, weights {result['weights'][:12]}"]
    for e in result["engines"]:
        lines.append(f"engine {e['file']} " + ("is there too" if e["kept"] else f"was left out: {e['why']}"))
    emit(args, result, "\n".join(lines))
    return 0
