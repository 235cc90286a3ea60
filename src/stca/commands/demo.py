"""`stca demo`: export, verify, measure and report the checkpoint that ships with the project."""

from __future__ import annotations

import argparse

from stca.commands.options import emit, require_file
from stca.commands.progress import progress_on_stderr
from stca.errors import CheckpointError

HELP = "export, verify, measure and report the checkpoint that ships with the project"
EXAMPLES = (
    "stca demo",
    "stca demo --out demo-out --json",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("--out", default="demo-out", metavar="DIR", help="where the bundle and the report go")
    p.add_argument("--checkpoint", help="a trained checkpoint (default: the one that ships with stca)")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    if args.checkpoint:
        require_file(args.checkpoint, "checkpoint file", CheckpointError)
    progress = progress_on_stderr("torch, onnx and matplotlib")
    from stca.report.demo import demo

    result = demo(args.out, checkpoint=args.checkpoint, progress=progress)
    emit(args, result.as_dict(), f"{result.summary}\nreport: {result.report}")
    return 0
