"""`stca report`: an HTML page about a bundle: its graph and cut, parity, latency measured here."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from stca.bundle import Bundle, require_writable
from stca.commands.options import count, emit, measured, measured_options, positive, sizes
from stca.commands.progress import progress_on_stderr

HELP = "an HTML page about a bundle: its graph and cut, parity, latency measured here"
EXAMPLES = (
    "stca report bundle",
    "stca report bundle --out page.html --history 512,2048 --targets 300",
    "stca report bundle --engine graphs --engine tensorrt",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument("--out", metavar="FILE", help="the page (default: BUNDLE-report.html beside the bundle)")
    p.add_argument("--title", help="the page's heading (default: the bundle's name)")
    p.add_argument("--history", type=sizes, metavar="N,N", help="histories to measure (default: within the limit)")
    p.add_argument("--targets", type=sizes, metavar="N,N", help="targets to measure (default: 32,300)")
    measured_options(p)
    p.add_argument("--threads", type=count, help="threads of one request (default: every core)")
    p.add_argument("--seconds", type=positive, default=0.5, help="time for each figure")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    bundle = Bundle.load(args.bundle)
    place = bundle.path.resolve()
    out = args.out or place.with_name(f"{place.name}-report.html")
    require_writable(Path(out))
    progress = progress_on_stderr("matplotlib and onnx")
    from stca.report.measured import report_of

    page, latency = report_of(
        bundle,
        out,
        title=args.title,
        histories=args.history,
        targets=args.targets,
        threads=args.threads,
        seconds=args.seconds,
        on=measured(args),
        commands=(shlex.join(["stca", "report", args.bundle]),),
        progress=progress,
    )
    emit(args, {"report": str(page), "bench": latency.as_dict()}, f"report: {page}")
    return 0
