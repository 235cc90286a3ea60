"""What a request costs end to end, against what a user would otherwise run, and how cost grows with the history.

    python benchmarks/request.py --out benchmarks/results/NAME.json

A model of the given size with random weights is exported and measured in one process:

- `bench`: user_encoder, target_scorer, hit, miss, pointwise (measured on two targets, scaled) at 300 targets;
- `peers` of a hit: the same target side in torch eager and torch.compile with the encoded history in hand, and the
  whole unsplit request in ONNX Runtime, torch eager and torch.compile, which encodes the history each time;
- `scaling`: miss and hit from 1k to 64k tokens, and the exponent fitted to them on log-log axes;
- `floor`: the operations and bytes of a hit and a miss, and the rate of a matrix product of the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcome import command, tell
from random_model import add_size, config_of

from stca import probe
from stca.bundle import Bundle
from stca.checks.bench import bench
from stca.checks.timing import machine, measure
from stca.checks.verify import prove
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import load_checkpoint, save_checkpoint
from stca.export.reference.config import Field
from stca.export.reference.module import Stca
from stca.runtime import OnnxRuntimeEngine, Request, Session


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        model, bundle = _export(args, Path(folder))
        result = {
            "command": command(),
            "machine": machine(args.threads),
            "versions": {"torch": torch.__version__, "engine": OnnxRuntimeEngine(bundle.file("request")).name},
            "config": json.loads(model.config.to_json()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bench": bench(
                bundle, [args.history], [args.targets], threads=args.threads, seconds=args.seconds, progress=_say
            ).as_dict(),
            "peers": _peers(model, bundle, args),
            "scaling": _scaling(bundle, args),
            "floor": _floor(bundle, args),
        }
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size(p)
    p.add_argument("--history", type=int, default=10_000)
    p.add_argument("--targets", type=int, default=300)
    p.add_argument("--scaling", type=lambda s: [int(n) for n in s.split(",")], default=[1000, 4000, 16_000, 64_000])
    p.add_argument("--threads", type=int)
    p.add_argument("--seconds", type=float, default=3.0, help="time for each figure")
    p.add_argument("--out")
    return p.parse_args()


def _say(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def _export(args: argparse.Namespace, folder: Path) -> tuple[Stca, Bundle]:
    torch.manual_seed(0)
    config = config_of(args, max([*args.scaling, args.history]), request_fields=(Field("device", 3),))
    save_checkpoint(folder / "random.safetensors", Stca(config))
    checkpoint = load_checkpoint(folder / "random.safetensors")
    bundle = export_checkpoint(checkpoint, folder / "bundle", form=args.form, prove=prove, progress=_say)
    return checkpoint.build(args.form), bundle


def _peers(model: Stca, bundle: Bundle, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of each way to score the request, taken in turn so that the machine's drift meets all of them."""
    specs = bundle.manifest.graphs["request"].inputs
    inputs = probe.single(specs, args.history, args.targets, np.random.default_rng(0))
    feeds = probe.pack(specs, [inputs])
    tensors = {name: torch.from_numpy(x) for name, x in feeds.items()}
    session = Session.load(bundle.path, threads=args.threads)
    unsplit = OnnxRuntimeEngine(bundle.file("request"), threads=args.threads)
    request = Request(inputs, user="bench", version=0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = model.encode(tensors)
        target_side = lambda: torch.sigmoid(model.score_logits(tensors, state))  # noqa: E731
        ways: dict[str, Callable[[], object]] = {
            "hit": lambda: session.score(request),
            "torch eager, target side": target_side,
            "torch.compile, target side": torch.compile(target_side, dynamic=True),
            "onnxruntime, unsplit": lambda: unsplit.run(feeds),
            "torch eager, unsplit": lambda: model(tensors),
            "torch.compile, unsplit": torch.compile(lambda: model(tensors), dynamic=True),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(6):
            for name, run in ways.items():
                _say(f"peers, round {round_ + 1} of 6: {name}")
                times[name].extend(measure(run, 0.0, least=1))
    hit = float(np.median(times["hit"]))
    return [
        {"way": name, "p50_ms": float(np.median(t)) * 1e3, "over_hit": float(np.median(t)) / hit, "runs": len(t)}
        for name, t in times.items()
    ]


def _scaling(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    report = bench(
        bundle, args.scaling, [args.targets], threads=args.threads, seconds=args.seconds, pointwise=False, progress=_say
    )
    rows = {s: [r.p50_ms for r in report.rows if r.stage == s] for s in ("miss", "hit")}
    slope = {s: float(np.polyfit(np.log(args.scaling), np.log(ms), 1)[0]) for s, ms in rows.items()}
    return {"history": args.scaling, "targets": args.targets, "p50_ms": rows, "exponent": slope}


def _floor(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """Operations counted from the graph at its nominal request, and the matrix-product rate of this machine now."""
    split = bundle.manifest.split
    a, b = np.random.rand(args.history, args.width).astype("f"), np.random.rand(args.width, 4 * args.width).astype("f")
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    rate = 2 * a.size * b.shape[1] / float(np.median(measure(lambda: x @ y, 1.0)))
    return {
        "nominal": split["workload"],
        "user_gflop": split["user_work"] / 1e9,
        "target_gflop": (split["target_work"] + split["request_work"] + split["recomputed_work"]) / 1e9,
        "state_bytes": split["state_bytes"],
        "torch_matmul_gflop_per_s": rate / 1e9,
    }


if __name__ == "__main__":
    main()
