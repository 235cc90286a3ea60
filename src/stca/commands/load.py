"""`stca load`: traffic shaped like users' against a bundle in this process, or a server."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stca.bundle import require_folder
from stca.commands.options import count, emit, positive, require_file
from stca.commands.progress import progress_on_stderr
from stca.errors import UsageError

if TYPE_CHECKING:
    from stca.load.run import LoadReport
    from stca.load.traffic import Arrival, Traffic

HELP = "users' traffic against a bundle or a server, with latencies and goodput"
EXAMPLES = (
    "stca load bundle --seconds 30 --compare",
    "stca load http://127.0.0.1:8000 --admin http://127.0.0.1:8002 --rate 200 --deadline-ms 50",
    "stca load bundle --seconds 60 --report load.html",
    "stca load bundle --scenario offline --users 10000 --history 1000,10000 --json",
)
_SECONDS = 20.0
# How much of a run's length the capacity is measured for, twice; and the most seconds of that.
_MEASURED, _MEASURED_SECONDS = 0.2, 60.0


def range_(text: str, least: int = 1) -> tuple[int, int]:
    low, _, high = text.partition(",")
    fewest, most = (0 if n == "0" and not least else count(n) for n in (low, high or low))
    return fewest, most


def histories(text: str) -> tuple[int, int]:
    return range_(text, 0)


def spike(text: str) -> tuple[float, float, float]:
    parts = [positive(x) for x in text.split(",")]
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form EVERY,SECONDS,TIMES")
    return parts[0], parts[1], parts[2]


def crowd(text: str) -> tuple[int, float, int, float]:
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USERS,ZIPF,ITEMS,ZIPF")
    return count(parts[0]), float(parts[1]), int(parts[2]), float(parts[3])


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument(
        "target",
        metavar="BUNDLE|URL",
        help="directory of a bundle, or http://HOST:PORT of stca serve, with /v2/models/NAME where that serves several",
    )
    p.add_argument(
        "--seconds", type=positive, metavar="N", help="length of the traffic (default: 20, or all of --trace)"
    )
    p.add_argument(
        "--scenario",
        choices=("server", "offline"),
        default="server",
        help="as MLPerf names them: requests at times of their own, or each as soon as it can be",
    )
    p.add_argument("--rate", type=positive, metavar="R", help="requests a second (default: by --of-capacity)")
    p.add_argument("--of-capacity", type=positive, default=0.8, metavar="X", help="that part of what is measured first")
    p.add_argument("--deadline-ms", type=positive, metavar="N", help="sent along, and what goodput counts by")
    p.add_argument(
        "--connections", type=count, metavar="N", help="requests under way (default: 64, or 2 in this process)"
    )
    p.add_argument("--admin", metavar="URL", help="the server's admin port, where new events are appended")
    p.add_argument("--users", type=count, default=1000, metavar="N", help="how many there are")
    p.add_argument("--zipf", type=float, default=1.0, metavar="S", help="how much oftener frequent users return")
    p.add_argument("--history", type=histories, default=(100, 2000), metavar="A,B", help="events of a user at first")
    p.add_argument("--targets", type=range_, default=(100, 300), metavar="A,B", help="targets of a request")
    p.add_argument("--events", type=float, default=1.0, metavar="X", help="new events of a user between two requests")
    p.add_argument("--items", type=count, default=0, metavar="N", help="items that targets are (default: all)")
    p.add_argument("--items-zipf", type=float, default=0.0, metavar="S", help="how much oftener frequent ones come")
    p.add_argument(
        "--workload",
        choices=("steady", "trend", "burst"),
        default="steady",
        help="both crowds alike; from these users and items to others; or the others and these in turn, each twice",
    )
    p.add_argument(
        "--towards",
        type=crowd,
        metavar="USERS,ZIPF,ITEMS,ZIPF",
        help="the others (default: a sixth of the users, five times the items; steady: none)",
    )
    p.add_argument("--spike", type=spike, metavar="EVERY,SECONDS,TIMES", help="raise the rate now and then")
    p.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    p.add_argument(
        "--trace",
        metavar="FILE",
        help="replay the arrivals that --record kept, or those of a folder that a session recorded, with other values",
    )
    p.add_argument("--record", metavar="FILE", help="keep the arrivals, as JSON lines")
    p.add_argument("--cache-mib", type=int, default=1024, metavar="N", help="of a bundle: most MiB of user states")
    p.add_argument(
        "--split",
        metavar="SHARE|adaptive|FILE",
        help="of a bundle: share these MiB with rows of its table files: that part of them, as the load has it, or as "
        "`Recorded` wrote it (default: states alone)",
    )
    p.add_argument("--threads", type=count, metavar="N", help="of a bundle: threads of one request (default: 1)")
    p.add_argument("--report", metavar="FILE", help="write a page with pictures of it, in HTML")
    p.add_argument("--compare", action="store_true", help="of a bundle: without a store, too, by its own capacity")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    _check_target(args)
    args.until = args.seconds if args.scenario == "server" else None
    args.seconds = args.seconds or _SECONDS
    told = progress_on_stderr("onnxruntime")
    from stca.load.clients import Behind
    from stca.load.traffic import Traffic
    from stca.load.workloads import Crowd

    if args.report is not None and Path(args.report).is_dir():  # said before the traffic, not after it
        raise UsageError(f"{args.report}: is a directory; name a file in it as --report")
    traffic = Traffic(
        users=args.users, zipf=args.zipf, history=args.history, targets=args.targets, events=args.events,
        items=args.items, items_zipf=args.items_zipf, workload=args.workload,
        towards=Crowd(*args.towards) if args.towards else None, spike=args.spike, seed=args.seed,
    )  # fmt: skip
    remote = _remote(args)
    client = Behind(args.target, args.admin) if remote else _session(args, args.cache_mib, _split(args.split))
    reports: dict[str, LoadReport] = {}
    trace = _trace(args, traffic, client, told)
    requests = sum(a.targets > 0 for a in trace)
    told(f"{len(trace)} arrivals: {requests} requests, {len(trace) - requests} of new events")
    tokens = [a.tokens for a in trace] if args.trace is not None else args.history
    sizes = (min(tokens), max(tokens)) if tokens else None
    for line in _inputs(args, client, trace).unmet(max((a.items for a in trace), default=0), sizes):
        told(line)
    reports["load"] = _run(args, client, trace)
    data: dict[str, Any] = {"target": args.target, "traffic": dataclasses.asdict(traffic)}
    if args.compare:
        told("the same without a store")
        without, own = _session(args, 0), args.scenario == "server" and args.rate is None and args.trace is None
        if own:  # at the rate of the store it would only queue
            trace = _trace(args, traffic, without, told, record=False)
        reports["without_store"] = _run(args, without, trace)
        how = f"each at {args.of_capacity:g} of its capacity" if own else ""
        data["compared"] = _compared(reports["load"], reports["without_store"], how)
    data |= {name: dataclasses.asdict(report) for name, report in reports.items()}
    rows = [*_table(reports), *([data["compared"]] if args.compare else [])]
    if args.report is not None:
        data["report"] = str(_write_page(args, data))
        rows.append(f"report: {data['report']}")
    emit(args, data, "\n".join(rows))
    return 0


def _remote(args: argparse.Namespace) -> bool:
    return str(args.target).startswith(("http://", "https://"))


def _check_target(args: argparse.Namespace) -> None:
    """Raises what is wrong with the target, and with options that are not of its kind."""
    remote = _remote(args)
    if "//" not in args.target and ":" in args.target and not Path(args.target).exists():
        raise UsageError(f"{args.target}: is no directory; of a server write http://{args.target:.80}")
    if args.admin and not remote:
        raise UsageError("--admin: is of a server; leave it out, a bundle in this process takes events as it is")
    if remote and args.threads:
        raise UsageError("--threads: is of a bundle in this process; give it to `stca serve`")
    if remote and args.split:
        raise UsageError("--split: is of a bundle in this process; leave it out, a server has what it was started with")
    if remote and args.compare:
        raise UsageError("--compare: is of a bundle in this process; start a server with --cache-mib 0 and load that")
    if not remote:
        require_folder(args.target)
    if args.trace is not None:
        require_file(args.trace, "file or folder of a trace")


def _write_page(args: argparse.Namespace, data: dict[str, Any]) -> Path:
    from stca.checks.timing import machine
    from stca.report.load_page import write_load
    from stca.versions import installed

    command = ["stca", "load", args.target, "--scenario", args.scenario, "--seconds", f"{args.seconds:g}"]
    command += ["--rate", f"{args.rate:g}"] if args.rate else []
    command += ["--deadline-ms", f"{args.deadline_ms:g}"] if args.deadline_ms else []
    return write_load(
        args.report, data, commands=(shlex.join(command),), machine=machine(args.threads), versions=installed()
    )


def _session(args: argparse.Namespace, cache_mib: int, split: Any = None) -> Any:
    from stca.load.clients import InProcess
    from stca.runtime import Session

    return InProcess(Session.load(args.target, threads=args.threads or 1, cache_bytes=cache_mib << 20, split=split))


def _split(text: str | None) -> Any:
    """The policy that is asked for.

    Raises:
        UsageError: when there is none such.
    """
    from stca.runtime import MarginalUtility, Replayed, Static

    if text is None or text == "adaptive":
        return None if text is None else MarginalUtility()
    try:
        share = float(text)
    except ValueError:
        if not Path(text).is_file():
            raise UsageError(f"--split: {text!r:.80} is no file; give one, a share from 0 to 1, or adaptive") from None
        return Replayed(text)
    if not 0 <= share <= 1:
        raise UsageError(f"--split: is {text}, expected a share from 0 to 1")
    return Static(share)


def _trace(args: argparse.Namespace, traffic: Traffic, client: Any, told: Any, record: bool = True) -> list[Arrival]:
    from stca.load.run import capacity
    from stca.load.traffic import read_trace, recorded, until, write_trace
    from stca.trace import Trace

    if args.trace is not None:
        folder = Path(args.trace).is_dir()
        made = recorded(Trace(args.trace), client.manifest) if folder else read_trace(args.trace)
        return made if args.until is None else until(args.trace, made, args.until)
    rate = args.rate
    if rate is None and args.scenario == "server":
        told("measuring the capacity")
        seconds = min(_MEASURED * args.seconds, _MEASURED_SECONDS)
        probing = dataclasses.replace(traffic, spike=None).trace(5000.0, 2 * seconds)
        rate = args.of_capacity * capacity(client, _inputs(args, client, probing), probing, _connections(args), seconds)
        told(f"{rate:.1f} requests a second, {args.of_capacity:g} of the capacity")
    made = traffic.trace(rate or 5000.0, args.seconds)
    if args.record is not None and record:
        write_trace(args.record, made)
    return made


def _run(args: argparse.Namespace, client: Any, trace: list[Arrival]) -> LoadReport:
    from stca.load.run import run

    return run(
        client,
        _inputs(args, client, trace),
        trace,
        connections=_connections(args),
        deadline_ms=args.deadline_ms,
        offline=args.scenario == "offline",
        seconds=args.seconds if args.scenario == "offline" else None,
    )


def _inputs(args: argparse.Namespace, client: Any, trace: list[Arrival]) -> Any:
    from stca.load.inputs import Inputs

    return Inputs(client.manifest, max((a.tokens for a in trace), default=1), args.seed)


def _connections(args: argparse.Namespace) -> int:
    return args.connections or (64 if _remote(args) else 2)


def _counts(of: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in of.items()) or "none"


def _table(reports: dict[str, LoadReport]) -> list[str]:
    rows = []
    for name, r in reports.items():
        times = "  ".join(f"{n} {x:,.1f} ms" for n, x in r.latency_ms.items())
        of = r.hits + r.misses
        rows += [
            f"{name.replace('_', ' ')}: {r.scenario} scenario, {r.requests} requests in {r.seconds:.1f} s",
            f"  offered {r.offered_per_second:,.1f}/s  answered {r.answered_per_second:,.1f}/s"
            + (f"  goodput (in {r.deadline_ms:g} ms) {r.goodput_per_second:,.1f}/s" if r.deadline_ms else ""),
            f"  {times}" if times else "  nothing was answered",
            f"  hits {r.hits} ({100 * r.hits / max(1, of):.0f} %)  misses {r.misses}  "
            f"codes {_counts(r.codes)}" + (f"  sent again with their history {r.resent}" if r.resent else ""),
        ]
        rows += [f"  new events came {sum(r.events.values())} times: {_counts(r.events)}"] if r.events else []
        rows += [f"  not begun for want of time: {r.left} arrivals"] if r.left else []
        if r.late_ms > 1 and r.scenario == "server":
            rows.append(f"  all connections were busy for up to {r.late_ms:,.1f} ms (p99), which is in the latencies")
    return rows


# Of the requests that come, what a run without a store must answer for its latencies to be the model's, not a queue's.
_KEEPS_UP = 0.9


def _compared(with_: LoadReport, without: LoadReport, how: str) -> str:
    """What the store saved, and what was compared for it: throughputs, or latencies where both kept up."""
    if not (with_.latency_ms and without.latency_ms):
        return "saving: not known, as one of the two answered nothing"
    throughput = with_.answered_per_second / without.answered_per_second
    p50 = f"p50 {with_.latency_ms['p50']:.1f} ms with it, {without.latency_ms['p50']:.1f} ms without"
    if with_.scenario == "offline":
        return f"saving: {throughput:.2f} times the throughput, each as fast as it answers"
    if how:
        return f"saving: {throughput:.2f} times the throughput, {how}; {p50}"
    if without.answered_per_second < _KEEPS_UP * without.offered_per_second:
        return (
            f"saving: not known; without a store only {without.answered_per_second:,.1f} of "
            f"{without.offered_per_second:,.1f} requests a second were answered, and the rest waited; leave out --rate "
            "and --trace to compare at the same share of each one's capacity"
        )
    return f"saving: p50 {without.latency_ms['p50'] / with_.latency_ms['p50']:.2f} times shorter, same traffic; {p50}"
