"""What a user state in 8 bits costs and buys, on the shipped checkpoint with the generated log's labels.

    python benchmarks/calibration.py --out benchmarks/results/calibration-cpu.json

- `formats`: each kind and granularity over all tensors of the state: bytes, the change of AUC and of the best ten
  against float32, with 95 % intervals; and the methods that choose a range, for `tensor`;
- `layers`: each tensor alone;
- `lengths`: the error of a score from 1k to 64k tokens, of a bundle exported for so many;
- `speed`: hits and misses of one request in turn;
- `weights`: tables of int8, and matrices of int8, by what these are multiplied with, and of fp8: bytes, and the change
  as for `formats`;
- `weights_speed`: hits and misses in turn, with matrices of int8, of the shipped checkpoint and of a random one of
  width 256;
- `gallery`: the gallery's models, with random weights: how far scores move, and the best ten, with the state in 8 bits
  and with the matrices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from outcome import command, tell

from stca import probe
from stca.arrays import Array, best_kept
from stca.bundle import Bundle
from stca.calibration.choices import Options, formats_of, state_choices, weight_choices, with_ranges
from stca.calibration.quality import Budget, measure
from stca.calibration.quantized_bundle import Formats, state_bytes, weights_bytes, write_quantized
from stca.calibration.quantized_state import quantizable
from stca.checks.timing import machine
from stca.checks.trace_runs import TraceRuns, speed, tasks_of
from stca.checks.verify import prove
from stca.errors import StcaError
from stca.examples import gallery
from stca.examples.train.traced import demo_trace
from stca.export.pipeline import export_checkpoint, export_module
from stca.export.reference.checkpoint import load_checkpoint
from stca.report.demo import shipped_checkpoint
from stca.runtime import Request, Session
from stca.trace import Traced
from stca.versions import installed

BUDGET = Budget.parse("auc=0.0005,top10=0.99")
CHOICES = (
    *(Options(kind, granularity) for kind in ("int8", "fp8") for granularity in ("token", "head", "channel", "tensor")),
    *(Options("int8", "tensor", method) for method in ("percentile", "entropy", "mse")),
)
GALLERY = {
    "state int8": Options("int8"),
    "state fp8": Options("fp8"),
    "matrices int8": Options(None, weights="int8"),
    "matrices fp8": Options(None, weights="fp8"),
}
LENGTHS = (1_000, 4_000, 16_000, 64_000)


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = Bundle.load(args.bundle) if args.bundle else _exported(root / "bundle")
        _say("drawing the trace")
        requests = list(demo_trace(users=args.users, history=args.history, targets=args.targets))
        runs = TraceRuns(args.threads)
        known = json.loads(Path(args.out).read_text(encoding="utf-8")) if args.out and Path(args.out).exists() else {}
        parts: dict[str, Callable[[], Any]] = {
            "quality": lambda: _quality(bundle, requests, runs, root),
            "lengths": lambda: _lengths(bundle, runs, root, args.threads),
            "speed": lambda: _speed(bundle, requests[0], runs, root, args),
            "weights": lambda: _weights(bundle, requests, runs, root),
            "weights_speed": lambda: _weights_speed(bundle, requests, runs, root, args),
            "gallery": lambda: _gallery(runs, root),
        }
        about = {
            "command": command(),
            "machine": machine(args.threads),
            "versions": installed(),
            "requests": {"users": args.users, "history": args.history, "targets": args.targets},
        }
        result = known | {name: {**about, "found": parts[name]()} for name in args.parts.split(",")}
    tell(result, args.out)


def _exported(out: Path) -> Bundle:
    return export_checkpoint(load_checkpoint(shipped_checkpoint()), out, prove=prove, progress=_say)


Row = Callable[[Formats, str], dict[str, Any]]


def _rows_of(bundle: Bundle, requests: Sequence[Traced], runs: TraceRuns, root: Path) -> Row:
    """What measures formats of a bundle on a trace."""
    _say("float32 on the trace")
    exact = list(runs.scores(bundle, requests))

    def row(formats: Formats, name: str) -> dict[str, Any]:
        _say(name)
        made = write_quantized(bundle, formats, root / name)
        found = list(runs.scores(made, requests))
        measures = measure(exact, found, [r.labels for r in requests], tasks_of(bundle.manifest), BUDGET)
        return {
            "name": name,
            "ratio": state_bytes(made.manifest) / state_bytes(bundle.manifest),
            "weights_ratio": weights_bytes(made.manifest) / weights_bytes(bundle.manifest),
            "rms": float(np.sqrt(np.mean([np.square(a - b).mean() for a, b in zip(exact, found, strict=True)]))),
            "largest": max(float(np.abs(a - b).max()) for a, b in zip(exact, found, strict=True)),
            **{m.name: [m.estimate.value, m.estimate.low, m.estimate.high, m.verdict] for m in measures},
        }

    return row


def _quality(bundle: Bundle, requests: Sequence[Traced], runs: TraceRuns, root: Path) -> dict[str, Any]:
    row = _rows_of(bundle, requests, runs, root)
    candidates, rows = quantizable(bundle.manifest.state), []
    for options in CHOICES:
        formats = formats_of(bundle, candidates, options, runs.states(bundle, requests))
        rows.append(row(formats, f"{options.kind}-{options.granularity}-{options.method}"))
        if options == CHOICES[0]:
            alone = formats
    layers = [row({name: format}, f"{format.kind}-alone-{name}") for name, format in alone.items()]
    return {"formats": rows, "layers": layers}


def _lengths(bundle: Bundle, runs: TraceRuns, root: Path, threads: int | None) -> list[dict[str, float]]:
    """Errors of scores of random requests, by length; the state's own window is lifted for it."""
    from dataclasses import replace

    from stca.bundle import seal

    rows = []
    specs = bundle.manifest.graphs["request"].inputs
    some = [Traced(probe.single(specs, 2_000, 4, np.random.default_rng(0)))]
    made = {}
    for kind in ("int8", "fp8"):
        options = Options(kind)
        formats = formats_of(bundle, quantizable(bundle.manifest.state), options, runs.states(bundle, some))
        made[kind] = write_quantized(bundle, formats, root / f"long-{kind}")
    made["float32"] = write_quantized(bundle, {}, root / "long")
    sessions = {}
    for name, one in made.items():
        seal(one.path, replace(one.manifest, max_history=None, quantization=None))
        sessions[name] = Session.load(one.path, threads=threads, engine="graphs", cache_bytes=0)
    for tokens in LENGTHS:
        _say(f"{tokens} tokens")
        request = Request(probe.single(specs, tokens, 64, np.random.default_rng(tokens)))
        scores: dict[str, Array] = {name: session.score(request) for name, session in sessions.items()}
        errors = {k: float(np.sqrt(np.square(scores[k] - scores["float32"]).mean())) for k in ("int8", "fp8")}
        rows.append({"tokens": tokens, **errors})
    return rows


def _speed(bundle: Bundle, traced: Traced, runs: TraceRuns, root: Path, args: argparse.Namespace) -> dict[str, Any]:
    made = {"float32": bundle}
    for options in (Options("int8"), Options("int8", "tensor"), Options("fp8")):
        name = f"{options.kind} {options.granularity}"
        formats = formats_of(bundle, quantizable(bundle.manifest.state), options, runs.states(bundle, [traced]))
        made[name] = write_quantized(bundle, formats, root / f"speed {name}")
    _say("speed")
    return speed(made, traced, args.threads, args.seconds)


def _weights(bundle: Bundle, requests: Sequence[Traced], runs: TraceRuns, root: Path) -> list[dict[str, Any]]:
    row = _rows_of(bundle, requests, runs, root)
    rows = [row(_chosen(bundle, requests, runs, tables="int8"), "tables")]
    for activations in ("none", "token", "tensor"):
        formats = _chosen(bundle, requests, runs, weights="int8", activations=activations)
        rows.append(row(formats, f"weights-{activations}"))
    return [*rows, row(_chosen(bundle, requests, runs, weights="fp8"), "weights-fp8")]


def _weights_speed(
    bundle: Bundle, requests: Sequence[Traced], runs: TraceRuns, root: Path, args: argparse.Namespace
) -> dict[str, Any]:
    wide = _random(root / "wide", args.wide)
    some = Traced(probe.single(wide.manifest.graphs["request"].inputs, args.history, 300, np.random.default_rng(0)))
    times = {}
    for name, one, traced in (("shipped", bundle, requests[0]), (f"random, width {args.wide}", wide, some)):
        made = {"float32": one}
        for activations in ("none", "token", "tensor"):
            formats = _chosen(one, [traced], runs, weights="int8", activations=activations)
            made[activations] = write_quantized(one, formats, root / f"{name} {activations}")
        _say(f"speed of {name}")
        sizes = {n: weights_bytes(b.manifest) for n, b in made.items()}
        times[name] = {**speed(made, traced, args.threads, args.seconds), "weights_bytes": sizes}
    return times


def _gallery(runs: TraceRuns, root: Path) -> list[dict[str, Any]]:
    """Each model, how far 8 bits move its scores in units of their own spread, and the best ten of 300."""
    rows = []
    for name in sorted(p.stem for p in Path(gallery.__file__).parent.joinpath("models").glob("[a-z]*.py")):
        model = gallery.load(name)
        bundle = export_module(model(), root / name, prove=lambda *_: {}, source={"kind": "callable", "name": name})
        specs = bundle.manifest.graphs["request"].inputs
        requests = [Traced(probe.single(specs, model.history, 300, np.random.default_rng(i))) for i in range(8)]
        exact = list(runs.scores(bundle, requests))
        spread = np.sqrt(np.mean([x.var() for x in exact]))
        for what, options in GALLERY.items():
            _say(f"{name}: {what}")
            try:
                formats: Formats = dict(weight_choices(bundle, options))
                if options.kind is not None:
                    candidates = state_choices(bundle, options, {})
                    formats = formats_of(bundle, candidates, options, runs.states(bundle, requests))
                made = write_quantized(bundle, formats, root / f"{name} {what}")
            except StcaError as e:
                rows.append({"model": name, "what": what, "refused": str(e).replace(str(root), "…")})
                continue
            found = list(runs.scores(made, requests))
            off = np.sqrt(np.mean([np.square(a - b).mean() for a, b in zip(exact, found, strict=True)]))
            kept = [best_kept(a[:, 0], b[:, 0], 10) / 10 for a, b in zip(exact, found, strict=True)]
            sizes = [state_bytes(b.manifest, model.history) for b in (made, bundle)]
            if options.kind is None:
                sizes = [weights_bytes(b.manifest) for b in (made, bundle)]
            row = {"bytes": sizes[0] / sizes[1], "rms": float(off / spread), "top10": float(np.mean(kept))}
            rows.append({"model": name, "what": what, **row})
    return rows


def _chosen(bundle: Bundle, requests: Sequence[Traced], runs: TraceRuns, **options: Any) -> Formats:
    chosen = Options(None, **options)
    formats = dict(weight_choices(bundle, chosen))
    if chosen.activations == "tensor":
        formats |= with_ranges(bundle, formats, "absmax", runs, requests[:8])
    return formats


def _random(out: Path, width: int) -> Bundle:
    """The shipped checkpoint's config with wider layers, and weights that nobody trained."""
    import torch

    from stca.export.reference.checkpoint import Checkpoint
    from stca.export.reference.module import Stca

    config = dataclasses.replace(load_checkpoint(shipped_checkpoint()).config, width=width, heads=width // 32)
    torch.manual_seed(0)
    checkpoint = Checkpoint(config, Stca(config).eval().state_dict())
    return export_checkpoint(checkpoint, out, prove=lambda *_: {}, progress=_say)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", help="of the shipped checkpoint (default: exported anew)")
    p.add_argument("--users", type=int, default=64)
    p.add_argument("--history", type=int, default=10_000)
    p.add_argument("--targets", type=int, default=512)
    p.add_argument("--threads", type=int)
    p.add_argument("--seconds", type=float, default=5.0)
    p.add_argument("--wide", type=int, default=256, help="width of the random checkpoint of `weights`")
    p.add_argument("--parts", default="quality,lengths,speed,weights,weights_speed,gallery", help="what to measure")
    p.add_argument("--out", metavar="FILE", help="where results go; parts that are there and not measured stay")
    return p.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
