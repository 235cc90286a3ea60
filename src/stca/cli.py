"""The command line: each command is a thin layer over a public function.

`--json` prints one JSON object on stdout and everything else on stderr. Exit codes: 0 done, 1 a check failed, 2 bad
usage or input. An error is one line; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import stca
from stca.bundle import Bundle, Scope
from stca.errors import StcaError

Command = Callable[[argparse.Namespace], int]
# What `inspect` says of an engine; --json has the rest.
_ENGINE_FACTS = ("graph", "flavour", "version", "sm", "precision", "attention", "file", "bytes", "requests")
ENGINES = ("onnxruntime", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "bf16", "fp16")


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on bad usage and no abbreviations that a later option could make ambiguous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = _parser().parse_args(argv)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that half-written bundles go
    try:
        return int(args.run(args))
    except StcaError as e:
        if args.debug:
            raise
        if args.json:
            print(json.dumps({"error": str(e)}), flush=True)
        return _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as e:
        if args.debug:
            raise
        return _fail(f"the package {e.name!r} is not installed; install the extra: pip install 'stca[export]'", 2)
    except Exception as e:
        if args.debug:
            raise
        return _fail(f"unexpected {type(e).__name__}: {e}; run it again with --debug and report it", 2)


def _fail(message: str, code: int) -> int:
    print(f"stca: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = _Parser(prog="stca", description=stca.__doc__)
    parser.add_argument("--version", action="version", version=f"stca {stca.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[common], help=help, description=help)
        command.set_defaults(run=run)
        return command

    p = add("export", _export, "checkpoint → verified bundle with the request graph and both halves")
    p.add_argument(
        "checkpoint", nargs="?", help="safetensors, or a torch state dict with its config in a .json beside it"
    )
    p.add_argument("--model", metavar="MODULE:CALLABLE", help="instead: a callable that returns a RequestModel")
    p.add_argument("--out", required=True, metavar="BUNDLE", help="directory of the bundle")
    p.add_argument(
        "--form", choices=("auto", "projected", "absorbed"), default="auto", help="the attention's exact form"
    )
    _cut_options(p)

    p = add("split", _split, "any ONNX model → verified bundle with its two halves")
    p.add_argument("model", metavar="MODEL.onnx")
    p.add_argument("--user-inputs", type=_names, default=[], metavar="A,B", help="known for a user before any request")
    p.add_argument("--request-inputs", type=_names, default=[], metavar="C", help="known when a request comes")
    p.add_argument("--target-inputs", type=_names, default=[], metavar="D", help="one or more per target")
    p.add_argument("--out", required=True, metavar="BUNDLE")
    _cut_options(p)

    p = add("verify", _verify, "parity of every stage against a float64 reference")
    p.add_argument("bundle")
    p.add_argument("--model", metavar="MODULE:CALLABLE", help="the callable the bundle was exported from")
    p.add_argument("--engine", choices=ENGINES, help="check these built engines instead, and name the node at fault")
    p.add_argument("--precision", choices=PRECISIONS, help="of the engines; default the fastest that run here")

    p = add("bench", _bench, "latency per stage, hit and miss, with the pointwise baseline")
    p.add_argument("bundle")
    p.add_argument("--history", type=_sizes, default=[512, 2048, 10_000], metavar="N,N", help="default 512,2048,10000")
    p.add_argument("--targets", type=_sizes, default=[1, 32, 300], metavar="N,N", help="default 1,32,300")
    p.add_argument("--threads", type=_count, help="threads of one request; default every core")
    p.add_argument("--seconds", type=_positive, default=1.0, help="time for each figure")

    p = add("build", _build, "engines of both halves, written into the bundle")
    p.add_argument("bundle")
    p.add_argument("--engine", choices=ENGINES, required=True)
    p.add_argument("--sm", type=_count, metavar="NN", help="compute capability to build for, 89 for 8.9")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32")
    p.add_argument(
        "--attention",
        choices=("function", "plugin", "fused", "decomposed"),
        help="how the operator gets in; default the engine's own way",
    )
    p.add_argument("--history-max", type=_count, metavar="N", help="most history tokens; default the bundle's limit")
    p.add_argument("--targets-max", type=_count, default=512, metavar="N", help="most targets (512)")
    p.add_argument("--requests-max", type=_count, default=1, metavar="N", help="most requests of a batch (1)")
    p.add_argument("--history-buckets", type=_sizes, default=[], metavar="N,N", help="a profile for each range up to N")
    p.add_argument("--size", action="append", type=_size, default=[], metavar="DIM=N", help="most of any other size")
    p.add_argument("--refit", choices=("none", "identical", "weights"), help="can finished engines take new weights")
    p.add_argument("--provider", default="CPUExecutionProvider", help="execution provider of --engine onnxruntime")
    p.add_argument("--no-cache", action="store_true", help="keep no copy of built engines outside the bundle")
    p.add_argument("--dry-run", action="store_true", help="build nothing; say what would be built, and its memory")

    p = add("refit", _refit, "new weights into existing graphs and engines")
    p.add_argument("bundle")
    p.add_argument("--checkpoint", required=True, metavar="NEW", help="of the same config")
    p.add_argument("--out", metavar="BUNDLE", help="the new bundle; default replaces the old one")

    p = add("inspect", _inspect, "what is inside a bundle: graphs, scopes, state, sizes, costs")
    p.add_argument("bundle")

    p = add("demo", _demo, "export, verify, measure and report the checkpoint that ships with the project")
    p.add_argument("--out", default="demo-out", metavar="DIR", help="where the bundle and the report go")
    p.add_argument("--checkpoint", help="another checkpoint of the same log")
    return parser


def _cut_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--history", type=_count, default=10_000, metavar="N", help="history tokens to cut for")
    p.add_argument("--targets", type=_count, default=300, metavar="N", help="targets to cut for")
    p.add_argument("--size", action="append", type=_size, default=[], metavar="DIM=N", help="the same for other sizes")
    p.add_argument("--flops-per-byte", type=_positive, metavar="F", help="work worth redoing to save a byte of state")
    p.add_argument("--max-history", type=_count, metavar="N", help="longest history to serve")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _sizes(text: str) -> list[int]:
    return [_count(n) for n in text.split(",")]


def _size(text: str) -> tuple[str, int]:
    name, equals, n = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form DIM=N")
    return name, _count(n)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _progress() -> Callable[[str], None]:
    start = time.monotonic()
    return lambda step: print(f"[{time.monotonic() - start:6.1f} s] {step}", file=sys.stderr, flush=True)


def _emit(args: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    print(json.dumps(data) if args.json else text, flush=True)


def _cut(args: argparse.Namespace) -> Any:
    from stca.export.cut import DEFAULT_FLOPS_PER_BYTE
    from stca.export.pipeline import CutOptions

    workload = {"N_h": args.history, "N_t": args.targets, "B": 1, "B_plus_1": 2, **dict(args.size)}
    return CutOptions(workload, args.flops_per_byte or DEFAULT_FLOPS_PER_BYTE)


def _exported(args: argparse.Namespace, bundle: Bundle) -> int:
    m = bundle.manifest
    data = {
        "bundle": str(bundle.path),
        "weights": m.weights,
        "parity": m.parity,
        "state": {"bytes": m.split["state_bytes"], "bytes_per_token": m.split["bytes_per_token"]},
        "request_dependencies": m.split["request_dependencies"],
        "notes": m.split["notes"],
    }
    lines = [
        f"{bundle.path}: verified, weights {m.weights[:12]}",
        f"user state: {m.split['bytes_per_token']} bytes per history token, {m.split['state_bytes']:,} bytes in all",
        *(d["text"] for d in m.split["request_dependencies"]),
        *m.split["notes"],
    ]
    _emit(args, data, "\n".join(lines))
    return 0


def _export(args: argparse.Namespace) -> int:
    from stca.export.checkpoint import load_checkpoint
    from stca.export.pipeline import export_checkpoint, export_module, resolve
    from stca.verify import prove

    progress = _progress()
    if (args.checkpoint is None) == (args.model is None):
        raise StcaError("export needs a CHECKPOINT or --model MODULE:CALLABLE, one of the two")
    if args.model:
        if args.form != "auto":
            raise StcaError("--form: only a CHECKPOINT has both forms; choose the form inside your own module")
        model = resolve(args.model)
        bundle = export_module(
            model,
            args.out,
            prove=functools.partial(prove, progress=progress),
            source={"kind": "callable", "name": args.model},
            max_history=args.max_history,
            cut=_cut(args),
            progress=progress,
        )
    else:
        bundle = export_checkpoint(
            load_checkpoint(args.checkpoint),
            args.out,
            prove=functools.partial(prove, progress=progress),
            form=args.form,
            max_history=args.max_history,
            cut=_cut(args),
            progress=progress,
        )
    return _exported(args, bundle)


def _split(args: argparse.Namespace) -> int:
    from stca.export.pipeline import split_onnx
    from stca.verify import prove

    progress = _progress()
    scopes: dict[str, Scope] = {}
    marks: list[tuple[Scope, list[str]]] = [
        ("user", args.user_inputs),
        ("request", args.request_inputs),
        ("target", args.target_inputs),
    ]
    for scope, names in marks:
        for name in names:
            if scopes.setdefault(name, scope) != scope:
                raise StcaError(f"input {name!r} is listed as {scopes[name]} and as {scope}; choose one")
    bundle = split_onnx(
        args.model,
        scopes,
        args.out,
        prove=functools.partial(prove, progress=progress),
        max_history=args.max_history,
        cut=_cut(args),
        progress=progress,
    )
    return _exported(args, bundle)


def _verify(args: argparse.Namespace) -> int:
    if args.precision and not args.engine:
        raise StcaError("--precision: is of built engines; say which with --engine")
    bundle = Bundle.load(args.bundle)
    choice = None
    if args.engine:
        from stca.runtime.engine_choice import best_engine

        choice = best_engine(bundle.manifest, only=args.engine, precision=args.precision)

    from stca.engine_checks import verify_engine
    from stca.export.pipeline import resolve
    from stca.verify import verify

    module = resolve(args.model).module if args.model else None
    if choice:
        report = verify_engine(bundle, choice, module=module, progress=_progress())
    else:
        report = verify(bundle, module=module, progress=_progress())
    lines = [f"{'stage':<16} {'max abs':>9} {'limit':>9} {'max rel':>9} {'cosine':>11} {'top-k':>6}"]
    lines += [
        f"{s.name:<16} {s.max_abs:9.2e} {f'{s.limit:.2e}' if s.limit else '-':>9} {s.max_rel:9.2e} {s.cosine:11.9f} "
        f"{s.topk_overlap:6.3f}{'' if s.passed else '  FAILED'}"
        for s in report.stages
    ]
    _emit(
        args, report.as_dict(), "\n".join([*lines, f"{'passed' if report.passed else 'FAILED'} ({report.reference})"])
    )
    return 0 if report.passed else 1


def _bench(args: argparse.Namespace) -> int:
    from stca.bench import bench

    report = bench(
        Bundle.load(args.bundle),
        args.history,
        args.targets,
        threads=args.threads,
        seconds=args.seconds,
        progress=_progress(),
    )
    lines = [f"{'history':>8} {'targets':>8} {'stage':<14} {'p50 ms':>10} {'p95 ms':>10} {'p99 ms':>10} {'runs':>5}"]
    for r in report.rows:
        note = "" if r.measured_targets == r.targets else f"  (measured on {r.measured_targets} targets, scaled)"
        times = f"{r.p50_ms:10.2f} {r.p95_ms:10.2f} {r.p99_ms:10.2f}"
        lines.append(f"{r.history:8} {r.targets:8} {r.stage:<14} {times} {r.runs:5}{note}")
    lines += [
        f"history {r.history}, {r.targets} targets: "
        f"pointwise/miss {r.pointwise_over_miss or 0:.1f}, miss/hit {r.miss_over_hit:.1f}"
        for r in report.ratios
    ]
    _emit(args, report.as_dict(), "\n".join([*lines, f"{report.machine['cpu']}, {report.machine['threads']} threads"]))
    return 0


def _build(args: argparse.Namespace) -> int:
    from stca.build import Workload, build
    from stca.engine_cache import EngineCache

    workload = Workload(
        args.history_max, args.targets_max, args.requests_max, tuple(args.history_buckets), dict(args.size)
    )
    engines = build(
        args.bundle,
        engine=args.engine,
        sm=args.sm,
        precision=args.precision,
        attention=args.attention,
        workload=workload,
        refit=args.refit,
        provider=args.provider,
        cache=None if args.no_cache else EngineCache.default(),
        dry_run=args.dry_run,
        progress=_progress(),
    )
    lines = [
        f"{e['graph']}: {e['path']}, {e['cache']}" + (f"; {_memory(e['memory'])}" if e.get("memory") else "")
        for e in engines
    ]
    _emit(args, {"engines": engines}, "\n".join(lines))
    return 0


def _refit(args: argparse.Namespace) -> int:
    from stca.engine_cache import EngineCache
    from stca.refit import refit

    result = refit(args.bundle, args.checkpoint, out=args.out, cache=EngineCache.default(), progress=_progress())
    lines = [f"{result['bundle']}: verified, weights {result['weights'][:12]}"]
    for e in result["engines"]:
        lines.append(f"engine {e['file']} " + ("is there too" if e["kept"] else f"was left out: {e['why']}"))
    _emit(args, result, "\n".join(lines))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    import dataclasses

    bundle = Bundle.load(args.bundle)
    m = bundle.manifest
    lines = [
        f"{bundle.path}: {m.model['kind']} model, {m.precision}, weights {m.weights[:12]}, "
        f"{sum(f['bytes'] for f in m.files.values()):,} bytes",
        *(f"  {name:<24} {f['bytes']:>12,} bytes" for name, f in m.files.items()),
        "inputs",
        *(f"  {i.name:<24} {i.dtype:<8} {_dims(i.shape):<16} {i.scope}" for i in m.graphs["request"].inputs),
        f"user state: {m.split['bytes_per_token']} bytes per token; new events can "
        + ("be appended" if m.appendable else "not be appended"),
        *(f"  {s.name:<24} {s.dtype:<8} {_dims(s.shape):<16} {s.bytes_per_token} bytes per token" for s in m.state),
        f"work at {dict(m.split['workload'])}: user {m.split['user_work'] / 1e9:.3g} GFLOP kept, "
        f"{m.split['recomputed_work'] / 1e9:.3g} of them redone per request, "
        f"request {m.split['request_work'] / 1e9:.3g}, target {m.split['target_work'] / 1e9:.3g}",
        *(d["text"] for d in m.split["request_dependencies"]),
        *(line for e in m.engines for line in _engine_lines(e)),
    ]
    _emit(args, dataclasses.asdict(m), "\n".join(lines))
    return 0


def _engine_lines(entry: Mapping[str, Any]) -> list[str]:
    """What is known of an engine: how it was made, its layers, and what memory it takes."""
    lines = ["engine " + ", ".join(f"{name} {entry[name]}" for name in _ENGINE_FACTS if entry.get(name) is not None)]
    for profile in entry.get("profiles", ()):
        lines.append("  sizes: " + ", ".join(f"{dim} {low} to {high}" for dim, (low, _, high) in profile.items()))
    if layers := entry.get("layers"):
        counts = ", ".join(f"{kind} {n}" for kind, n in sorted(layers.items(), key=lambda x: -x[1]))
        lines.append(f"  layers before fusion: {counts}")
    if fused := entry.get("fused_layers"):
        lines.append(f"  layers of the engine: {len(fused)}")
        lines += [f"    {layer if isinstance(layer, str) else layer.get('Name', layer)}" for layer in fused]
    if memory := entry.get("memory"):
        lines.append(f"  {_memory(memory)}")
    return lines


def _memory(parts: Mapping[str, int]) -> str:
    return "memory at the largest sizes: " + ", ".join(f"{name.replace('_', ' ')} {n:,} B" for name, n in parts.items())


def _dims(shape: Sequence[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _demo(args: argparse.Namespace) -> int:
    from stca.demo import demo

    result = demo(args.out, checkpoint=args.checkpoint, progress=_progress())
    _emit(args, result.as_dict(), f"{result.summary}\nreport: {result.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
