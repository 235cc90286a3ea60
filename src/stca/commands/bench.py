"""`stca bench`: latency per stage, hit and miss, with the pointwise baseline."""

from __future__ import annotations

import argparse

from stca.account import check_account
from stca.bundle import Bundle, require_folder
from stca.commands.options import count, emit, measured, measured_options, positive, sizes
from stca.commands.progress import progress_on_stderr

HELP = "latency per stage, hit and miss, with the pointwise baseline"
EXAMPLES = (
    "stca bench bundle",
    "stca bench bundle --history 512,2048 --targets 300 --threads 1",
    "stca bench bundle --engine graphs --engine onnxruntime --engine tensorrt",
)


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument("--history", type=sizes, default=[512, 2048, 10_000], metavar="N,N", help="history tokens")
    p.add_argument("--targets", type=sizes, default=[1, 32, 300], metavar="N,N", help="targets of a request")
    measured_options(p)
    p.add_argument("--threads", type=count, help="threads of one request (default: every core)")
    p.add_argument("--no-predict", action="store_true", help="leave out what this CPU's rates predict of graphs")
    p.add_argument("--seconds", type=positive, default=1.0, help="time for each figure")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_folder(args.bundle)
    progress = progress_on_stderr("onnxruntime")
    from stca.checks.bench import bench

    bundle = Bundle.load(args.bundle)
    check_account(bundle.manifest, cut=bool(bundle.manifest.split))
    report = bench(
        bundle,
        args.history,
        args.targets,
        **measured(args),
        threads=args.threads,
        seconds=args.seconds,
        predict=not args.no_predict,
        progress=progress,
    )
    several = len({r.engine for r in report.rows}) > 1
    width = max((len(r.engine) for r in report.rows), default=0) + 2 if several else 0
    head = f"{'history':>8} {'targets':>8} {'engine' if several else '':<{width}}"
    lines = [f"{head}{'stage':<14} {'p50 ms':>10} {'p95 ms':>10} {'p99 ms':>10} {'runs':>5}"]
    for r in report.rows:
        note = "" if r.measured_targets == r.targets else f"  (measured on {r.measured_targets} targets, scaled)"
        times = f"{r.p50_ms:10.2f} {r.p95_ms:10.2f} {r.p99_ms:10.2f}"
        engine = f"{r.engine if several else '':<{width}}"
        expected = report.predicted.get((r.history, r.targets), {}).get(r.stage) if r.engine == "graphs" else None
        note += f"  predicted {expected:.2f}" if expected is not None else ""
        lines.append(f"{r.history:8} {r.targets:8} {engine}{r.stage:<14} {times} {r.runs:5}{note}")
    for ratio in report.ratios:
        baseline = f"pointwise/miss {ratio.pointwise_over_miss:.1f}, " if ratio.pointwise_over_miss else ""
        size = f"history {ratio.history}, {ratio.targets} targets{f' on {ratio.engine}' if several else ''}"
        lines.append(f"{size}: {baseline}miss/hit {ratio.miss_over_hit:.1f}")
    if report.unpredicted:
        lines.append(f"nothing predicted: {report.unpredicted}")
    lines += [f"{name}: not measured, {why}" for name, why in report.absent.items()]
    lines.append(f"cached {100 * report.cached:.1f} % of the work")
    emit(args, report.as_dict(), "\n".join([*lines, f"{report.machine['cpu']}, {report.machine['threads']} threads"]))
    return 0
