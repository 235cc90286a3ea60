"""`stca plan`: what serving a bundle takes on a machine: users that fit, latency, throughput, what helps most."""

from __future__ import annotations

import argparse
import dataclasses
import re

from stca.bundle import Bundle, require_folder
from stca.commands.options import count, emit
from stca.commands.progress import progress_on_stderr
from stca.errors import UsageError

HELP = "users that fit, predicted latency and throughput on a machine, what helps most"
EXAMPLES = (
    "stca plan bundle --gpu h100",
    "stca plan bundle --workload users=5000000,history=10000,targets=300,rate=2000 --gpu l40s --memory 48G",
    "stca plan bundle --gpu cpu --memory 64G",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.IGNORECASE)
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80G")
    return int(found[1]) * _UNITS[found[2].upper()]


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("bundle", metavar="BUNDLE", help="directory that `stca export` or `stca split` wrote")
    p.add_argument(
        "--workload",
        metavar="NAME=N,…",
        help="users, history, targets, zipf, rate (default: a million users, 10,000 events, 300 targets, zipf 1)",
    )
    p.add_argument("--gpu", default="h100", metavar="NAME", help="a100, l40s, h100, h200, b200, rtx5090; cpu: this one")
    p.add_argument("--memory", type=bytes_, metavar="SIZE", help="for weights and states (default: the GPU's)")
    p.add_argument("--threads", type=count, help="with --gpu cpu: threads of one request (default: every core)")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_folder(args.bundle)
    progress = progress_on_stderr("onnx")
    from stca.checks import plan as planning
    from stca.checks.forecast import Rates

    bundle = Bundle.load(args.bundle)
    asked = planning.Demand.parse(args.workload or "")
    demand = planning.Demand.parse(args.workload or "", bundle)
    if args.gpu == "cpu":
        from stca.checks.bench import cpu_rates

        if args.memory is None:
            raise UsageError("--gpu cpu: say with --memory how much of it there is for weights and states")
        progress("this CPU's rates")
        rates: Rates = cpu_rates(bundle, args.threads)
        memory, own = args.memory, "float32"
    elif args.gpu in planning.GPUS:
        gpu = planning.GPUS[args.gpu]
        rates, memory, own = planning.GpuRates(gpu.device), args.memory or gpu.memory, "bfloat16"
    else:
        raise UsageError(f"--gpu {args.gpu}: not known; there are {', '.join(planning.GPUS)} and cpu")
    formats = planning.formats_for(bundle, gpu=own == "bfloat16")
    plans = {name: planning.plan(bundle, rates, demand, memory, name) for name in formats}
    steps = planning.next_steps(bundle, rates, demand, memory, own)
    chosen, tables = plans[own], planning.table_bytes(bundle)
    quantized = bundle.manifest.rounding
    states = f"{quantized} as calibrated, the rest in {own}" if quantized else own
    where = "this memory too" if args.gpu == "cpu" else "the host's memory, not the GPU's"
    needed = -(-demand.rate // chosen.per_second)
    data = {
        "form": bundle.manifest.attention,
        "cached": bundle.manifest.cached,
        "workload": dataclasses.asdict(demand),
        "machine": args.gpu,
        "memory": memory,
        "state_format": own,
        "quantized": quantized,
        "table_bytes": tables,
        "plans": {name: dataclasses.asdict(made) for name, made in plans.items()},
        "machines_for_rate": needed or None,
        "next": steps,
        "measured": args.gpu == "cpu",
    }
    told = "this CPU's rates, measured now" if args.gpu == "cpu" else "datasheet rates; nothing was run on a GPU"
    form = f"form {bundle.manifest.attention}, " if bundle.manifest.attention else ""
    held = ", as its model takes" if (demand.history, demand.targets) != (asked.history, asked.targets) else ""
    labels = {name: f"{quantized} and {name}" if quantized else name for name in plans}
    width = max(map(len, labels.values()))
    lines = [
        f"{form}cached {100 * bundle.manifest.cached:.1f} % of the work, states in {states}",
        f"a request of {demand.history:,} events and {demand.targets:,} targets{held}: "
        f"a hit {chosen.hit_ms:.3f} ms, a miss {chosen.miss_ms:.3f} ms, computation alone, predicted from {told}",
        *(
            f"{labels[name]:<{width}} {p.state_bytes:>13,} bytes a user, {p.users:>11,} users fit, "
            f"{100 * p.hit_share:5.1f} % hits, {p.per_second:,.1f} requests a second, one at a time"
            for name, p in plans.items()
        ),
        *([f"tables in files: {tables:,} bytes, mapped into {where}"] if tables else []),
        *([f"{demand.rate:,.0f} requests a second take {needed:.0f} of them"] if demand.rate else []),
        "what helps throughput most: " + ", ".join(f"{name} {gain:.2f} x" for name, gain in steps.items()),
    ]
    emit(args, data, "\n".join(lines))
    return 0
