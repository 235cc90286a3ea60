"""`stca calibrate`: a bundle whose state and weights are in 8 bits, as far as a trace proves that the ranking stays."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from stca.bundle import Bundle, place_for
from stca.commands.options import count, dims, emit, positive, require_file
from stca.commands.progress import progress_on_stderr
from stca.errors import UsageError

if TYPE_CHECKING:
    from stca.calibration.quality import Budget
    from stca.calibration.search import Found, Tried
    from stca.trace import Trace, Traced

HELP = "keep the user state and weights in 8 bits, as far as a trace proves that the ranking stays"
EXAMPLES = (
    "stca calibrate bundle --trace trace --precision int8 --budget auc=0.0005,top10=0.99 --out bundle-int8",
    "stca calibrate demo-out/bundle --trace demo --precision int8 --tables int8 --out bundle-int8 --json",
)
DEMO = "demo"


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument(
        "--trace", required=True, metavar="DIR", help=f"recorded requests; {DEMO} for those of the generated log"
    )
    p.add_argument("--precision", choices=("int8", "fp8"), help="of the state; fp8 is E4M3")
    p.add_argument("--tables", choices=("int8", "fp8"), help="of embedding tables' rows; those in graphs can be int8")
    p.add_argument("--budget", default="auc=0.0005,top10=0.99", help="how far the ranking may move")
    p.add_argument(
        "--weights", choices=("int8", "fp8"), help="of the matrices of products, with a scale for each column"
    )
    p.add_argument(
        "--activations",
        choices=("none", "token", "tensor"),
        default="none",
        help="what those are multiplied with: float32, or int8 with a scale for each row, or one from the trace",
    )
    p.add_argument(
        "--granularity",
        choices=("token", "head", "channel", "tensor"),
        default="token",
        help="what has a scale of its own: each head of each token, or what the trace gives one for all tokens",
    )
    p.add_argument(
        "--method",
        choices=("absmax", "percentile", "entropy", "mse"),
        default="absmax",
        help="how the trace's ranges are chosen; of token they are exact",
    )
    p.add_argument("--out", required=True, metavar="BUNDLE", help="where the new bundle goes")
    p.add_argument("--threads", type=count, metavar="N", help="threads of one request (default: every core)")
    p.add_argument("--demo-users", type=count, default=64, metavar="N", help=f"of --trace {DEMO}: how many requests")
    p.add_argument("--seconds", type=positive, default=2.0, metavar="N", help="given to each figure of speed")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    from stca.calibration.quality import Budget

    budget = Budget.parse(args.budget)
    place_for(args.out)
    bundle = Bundle.load(args.bundle)
    trace = _recorded(args, bundle, budget) if args.trace != DEMO else None
    progress = progress_on_stderr("torch and onnx")
    import functools

    from stca.calibration.calibrate import calibrate
    from stca.calibration.choices import Options
    from stca.calibration.quantized_bundle import state_bytes, state_tokens, weights_bytes
    from stca.checks.trace_runs import TraceRuns, speed, tasks_of
    from stca.checks.verify import prove

    begun = _demo(args, bundle) if trace is None else lambda: trace
    made, found = calibrate(
        bundle,
        begun,
        options=Options(args.precision, args.granularity, args.method, args.tables, args.weights, args.activations),
        budget=budget,
        out=args.out,
        run=TraceRuns(args.threads),
        tasks=tasks_of(bundle.manifest),
        prove=functools.partial(prove, progress=progress),
        progress=progress,
    )
    progress("speed")
    request = next(iter(begun()))
    new = args.precision or args.tables or args.weights
    times = speed({"float32": bundle, new: made}, request, args.threads, args.seconds)
    shown = {n: shape for n, shape in times["inputs"].items() if shape}
    events = state_tokens(bundle.manifest)
    data: dict[str, Any] = {
        "bundle": str(made.path),
        "precision": args.precision,
        "granularity": args.granularity,
        **found.as_dict(),
        "tables": args.tables,
        "weights": args.weights,
        "activations": args.activations,
        "state_bytes": {"float32": state_bytes(bundle.manifest), new: state_bytes(made.manifest)},
        "weights_bytes": {"float32": weights_bytes(bundle.manifest), new: weights_bytes(made.manifest)},
        "speed": times,
        "timed": f"the trace's first request: {', '.join(f'{n} {dims(s)}' for n, s in shown.items())}",
        "state": f"state of a user of {events:,} events" if events else "state of a user",
        "parity": made.manifest.parity,
    }
    emit(args, data, "\n".join(_table(data, found, new)))
    return 0


def _recorded(args: argparse.Namespace, bundle: Bundle, budget: Budget) -> Trace:
    """The trace, looked at before libraries are loaded for it."""
    from stca.trace import Trace

    require_file(args.trace, "folder of a trace")
    trace = Trace(args.trace)
    from stca.checks.trace_runs import check_trace

    check_trace(trace, bundle.manifest)
    budget.check_labels(request.labels for request in trace)
    return trace


def _demo(args: argparse.Namespace, bundle: Bundle) -> Callable[[], Iterable[Traced]]:
    """What begins the generated log's trace anew."""
    from stca.examples.train.traced import demo_trace

    names = {s.name for s in bundle.manifest.graphs["request"].inputs if not s.name.endswith("_offsets")}
    history = min(10_000, bundle.manifest.max_history or 10_000)
    made = list(demo_trace(users=args.demo_users, history=history))
    if made[0].inputs.keys() != names:
        raise UsageError(f"--trace {DEMO}: is of the generated log, and this bundle takes other inputs; record a trace")
    return lambda: made


def _table(data: dict[str, Any], found: Found, new: str) -> list[str]:
    lines = [_choice(t) for t in sorted(found.tried[:-1], key=lambda t: -len(t.quantized))]
    lines += [f"taken: {_choice(found.taken)}, largest change of a score {found.taken.largest:.2g}"]
    for m in found.taken.measures:
        e = m.estimate
        value, low, high = map(m.told, (e.value, e.low, e.high))
        of = f" of {m.exact:.4f}" if m.exact is not None else ""
        lines.append(f"  {m.name}: {value}{of} ({low} to {high}), allowed {m.allows}: {m.verdict}")
    for p in sorted(found.parts, key=lambda p: -p.rms):
        if p.name in found.taken.high:
            lines.append(f"kept high: {p.name}, {p.node}: alone rms {p.rms:.2g}, would save {p.saved:,} bytes")
    lines += [found.left_open] if found.left_open else []
    for name, stages in data["speed"]["stages"].items():
        lines.append(f"{name}: hit {stages['hit']:.2f} ms, miss {stages['miss']:.2f} ms (medians)")
    lines.append(f"  of {data['timed']}")
    for what, size in ((data["state"], data["state_bytes"]), ("weights and tables", data["weights_bytes"])):
        lines.append(f"{what}: {size['float32']:,} bytes, now {size[new]:,}")
    lines.append(f"{data['bundle']}: verified")
    return lines


def _choice(t: Tried) -> str:
    worst = "" if t.holds else f" ({', '.join(m.name for m in t.measures if m.verdict == t.verdict)})"
    return (
        f"8 bits in {len(t.quantized)} of {len(t.quantized) + len(t.high)} tensors: state {t.ratio:.3f} of float32, "
        f"weights {t.weights_ratio:.3f}, rms {t.rms:.2g}: {t.verdict}{worst}"
    )
