"""What the rules that free user work gain: models of the gallery with and without them, against 300 copies in one run.

    python benchmarks/rules.py din long_short bst --history 2000 --out benchmarks/results/NAME.json

Each model is exported twice, with the rules and without, and served by ONNX Runtime: a miss and a hit of each bundle
and the pointwise graph with a copy of the user for each target take turns, on one thread. `operations` are counted from
shapes: what a hit takes, and what 300 copies take. A model of a fixed history has its own length, whatever `--history`
says, but with `--any-length`, for modules that take any. `gain` is of a hit with rules over the copies: as counted, as
measured, and the part of the counted gain that was measured. Besides the gallery's models there are DIN's units as
libraries spell them (`scorers.py`): `din-conv2d-sigmoid-80x40` is one of convolutions with two hidden layers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from outcome import command, tell
from scorers import ACTIVATIONS, LAYERS, scorer

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.timing import machine, measure_in_turn
from stca.checks.verify import prove
from stca.examples.gallery import NAMES, load, onnx_files
from stca.examples.gallery.declared import GalleryModel
from stca.export.analysis.cost import DEFAULT_WORKLOAD, NominalSizes
from stca.export.pipeline import CutOptions, split_onnx
from stca.export.split import inlined
from stca.runtime import OnnxRuntimeEngine, Request, Session
from stca.specs import TARGETS, TOKENS

_NAMED = (
    f"{', '.join(NAMES)}, or din-UNIT-ACTIVATION-HIDDEN of {', '.join(LAYERS)}; {', '.join(ACTIVATIONS)}; and sizes "
    "as 80x40"
)


def main() -> None:
    args = _arguments()
    result = {
        "command": command(),
        "machine": machine(1),
        "targets": args.targets,
        "rows": [_row(name, args) for name in args.names],
    }
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="+", type=_known, metavar="NAME", help=f"of {_NAMED}")
    p.add_argument("--history", type=int, default=2000, metavar="L", help="events; default 2000")
    p.add_argument("--any-length", action="store_true", help="give fixed histories that length too")
    p.add_argument("--targets", type=int, default=300, metavar="M", help="targets of the request; default 300")
    p.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each time on average; default 2")
    p.add_argument("--out", metavar="FILE", help="write the result there too")
    return p.parse_args()


def _known(name: str) -> str:
    try:
        if name not in NAMES:
            scorer(name)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {_NAMED}") from e
    return name


def _row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    model = load(name) if name in NAMES else scorer(name)
    if args.any_length:
        model = _longer(model, args.history)
    fixed = all(isinstance(n, int) for i in model.inputs.values() if i.scope == "user" for n in i.shape[1:])
    history = model.history if fixed else args.history
    request = model.request(history, args.targets)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx_files.write(model, "dynamo", file)
        whole = OnnxRuntimeEngine(file, threads=1)
        copies = model.rows(request, 0, args.targets)
        feeds = {n: copies[n] for n in whole.inputs}
        runs: dict[str, Callable[[], object]] = {"pointwise": lambda: whole.run(feeds)}
        told: dict[str, Any] = {"model": name, "history": history}
        told["pointwise"] = {"operations": _operations(file, {n: x.shape for n, x in feeds.items()})}
        for free, which in ((False, "without rules"), (True, "with rules")):
            bundle = _export(model, file, Path(folder) / which, history, args.targets, free)
            runs |= _served(bundle, request, which)
            told[which] = _told(bundle)
        times = measure_in_turn(runs, args.seconds)
    told["ms"] = {n: round(float(np.median(t)) * 1e3, 2) for n, t in times.items()}
    counted = told["pointwise"]["operations"] / told["with rules"]["operations"]
    measured = told["ms"]["pointwise"] / told["ms"]["hit with rules"]
    gain = {"counted": counted, "measured": measured, "measured / counted": measured / counted}
    told["gain"] = {n: round(x, 2) for n, x in gain.items()}
    return told


def _longer(model: GalleryModel, history: int) -> GalleryModel:
    """The model with a history of another fixed length."""
    shapes = {n: tuple(history if x == model.history else x for x in i.shape) for n, i in model.inputs.items()}
    inputs = {n: replace(i, shape=shapes[n]) for n, i in model.inputs.items()}
    return replace(model, inputs=inputs, history=history)


def _operations(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Work of the pointwise graph with inputs of these shapes."""
    graph = inlined(onnx.load(file))
    for value in graph.graph.input:
        for dim, n in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = n
    sizes = NominalSizes(graph, {})
    return sum(sizes.work(node) for node in graph.graph.node)


def _export(model: GalleryModel, file: Path, out: Path, history: int, targets: int, free: bool) -> Bundle:
    workload = {**DEFAULT_WORKLOAD, TOKENS: history, TARGETS: targets}
    scopes = {n: i.scope for n, i in model.inputs.items()}
    return split_onnx(file, scopes, out, prove=prove, cut=CutOptions(workload=workload, free=free))


def _served(bundle: Bundle, request: Mapping[str, Array], which: str) -> dict[str, Callable[[], object]]:
    session = Session.load(bundle.path, threads=1)
    asked = Request(request, "measured", 0)

    def miss() -> object:
        session.forget("measured")
        return session.score(asked)

    return {f"miss {which}": miss, f"hit {which}": lambda: session.score(asked)}


def _told(bundle: Bundle) -> dict[str, Any]:
    split = bundle.manifest.split
    again = split["recomputed_work"] + split["request_work"] + split["target_work"]
    return {
        "operations": again,
        "state_bytes": split["state_bytes"],
        "rules": [{k: v for k, v in rule.items() if v is not None} for rule in split.get("rules", ())],
    }


if __name__ == "__main__":
    main()
