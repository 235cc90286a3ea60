"""`stca plan`: what serving a bundle takes on a machine: users that fit, latency, throughput, what helps most."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from stca.account import check_account
from stca.arrays import Progress
from stca.bundle import Bundle, require_folder
from stca.commands.options import count, emit
from stca.commands.progress import progress_on_stderr
from stca.errors import UsageError

if TYPE_CHECKING:
    from stca.checks.forecast import Rates

HELP = "users that fit, predicted latency and throughput on a machine, what helps most"
EXAMPLES = (
    "stca plan bundle --gpu h100",
    "stca plan bundle --workload users=5000000,history=10000,targets=300,rate=2000 --gpu l40s --memory 48G",
    "stca plan bundle --gpu cpu",
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12})([KMGT]?)B?", text, re.IGNORECASE)
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
    p.add_argument("--memory", type=bytes_, metavar="SIZE", help="for weights and states (default: what it has)")
    p.add_argument("--threads", type=count, help="with --gpu cpu: threads of one request (default: every core)")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    require_folder(args.bundle)
    progress = progress_on_stderr("onnx")
    from stca.checks import plan as planning

    bundle = Bundle.load(args.bundle)
    check_account(bundle.manifest, cut=bool(bundle.manifest.split))
    asked = planning.Demand.parse(args.workload or "")
    demand = planning.Demand.parse(args.workload or "", bundle)
    rates, memory, own = _machine(args, bundle, progress)
    formats = planning.formats_for(bundle, gpu=own == "bfloat16")
    plans = {name: planning.plan(bundle, rates, demand, memory, name) for name in formats}
    data = {
        "form": bundle.manifest.attention,
        "cached": bundle.manifest.cached,
        "workload": dataclasses.asdict(demand),
        "machine": args.gpu,
        "memory": memory,
        "state_format": own,
        "quantized": bundle.manifest.rounding,
        "table_bytes": planning.table_bytes(bundle),
        "plans": {name: dataclasses.asdict(made) for name, made in plans.items()},
        "machines_for_rate": -(-demand.rate // plans[own].per_second) or None,
        "next": planning.next_steps(bundle, rates, demand, memory, own),
        "measured": args.gpu == "cpu",
    }
    emit(args, data, "\n".join(_lines(data, held=(demand.history, demand.targets) != (asked.history, asked.targets))))
    return 0


def _machine(args: argparse.Namespace, bundle: Bundle, progress: Progress) -> tuple[Rates, int, str]:
    """Rates, bytes of memory, and the format that states have there."""
    from stca.checks.plan import GPUS, GpuRates

    if args.gpu == "cpu":
        from stca.checks.bench import cpu_rates
        from stca.runtime.machine import memory

        progress("this CPU's rates")
        return cpu_rates(bundle, args.threads), args.memory or memory(), "float32"
    if (gpu := GPUS.get(args.gpu)) is None:
        raise UsageError(f"--gpu {args.gpu}: not known; there are {', '.join(GPUS)} and cpu")
    return GpuRates(gpu.device), args.memory or gpu.memory, "bfloat16"


def _lines(data: Mapping[str, Any], *, held: bool) -> Iterator[str]:
    """`data` for a reader; `held`: the model takes other sizes than were asked."""
    asked, own, quantized = data["workload"], data["state_format"], data["quantized"]
    form = f"form {data['form']}, " if data["form"] else ""
    states = f"{quantized} as calibrated, the rest in {own}" if quantized else own
    yield f"{form}cached {100 * data['cached']:.1f} % of the work, states in {states}"
    told = "this CPU's rates, measured now" if data["measured"] else "datasheet rates; nothing was run on a GPU"
    chosen, takes = data["plans"][own], ", as its model takes" if held else ""
    yield (
        f"a request of {asked['history']:,} events and {asked['targets']:,} targets{takes}: "
        f"a hit {chosen['hit_ms']:.3f} ms, a miss {chosen['miss_ms']:.3f} ms, computation alone, predicted from {told}"
    )
    labels = {name: f"{quantized} and {name}" if quantized else name for name in data["plans"]}
    width = max(map(len, labels.values()))
    for name, made in data["plans"].items():
        yield (
            f"{labels[name]:<{width}} {made['user_bytes']:>13,} bytes a user, {made['users']:>11,} users fit, "
            f"{100 * made['hit_share']:5.1f} % hits, {made['per_second']:,.1f} requests a second, one at a time"
        )
    if data["table_bytes"]:
        where = "this memory too" if data["measured"] else "the host's memory, not the GPU's"
        yield f"tables in files: {data['table_bytes']:,} bytes, mapped into {where}"
    if asked["rate"]:
        yield f"{asked['rate']:,.0f} requests a second take {data['machines_for_rate']:.0f} of them"
    yield "what helps throughput most: " + ", ".join(f"{name} {gain:.2f} x" for name, gain in data["next"].items())
