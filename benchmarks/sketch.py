"""What appending to a long history's sketch costs, beside computing the sketch anew, and whether both are equal.

    python benchmarks/sketch.py --out benchmarks/results/NAME.json

The gallery's SequenceO1, at the sizes of its paper (1024 prototypes of width 128), with random weights. One user's
state is made from the whole history; then events are appended to it, through `Session` on ONNX Runtime, in turn with
the state made anew. New events wait for the next request, which finishes the state: `first` is an append with that
request, `hit` one after it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcome import command, tell

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.timing import machine, measure_in_turn
from stca.checks.verify import prove
from stca.examples.gallery.declared import GalleryModel, Input
from stca.examples.gallery.models.sequence_o1 import ITEMS, MODEL, SequenceO1
from stca.export.pipeline import CutOptions, export_module
from stca.runtime import Request, Session


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    model = dataclasses.replace(
        MODEL,
        module=lambda: SequenceO1(args.narrow, args.width, args.slots),
        inputs={**MODEL.inputs, "last": Input("int64", ("batch", args.last), "user", ITEMS)},
    )
    with tempfile.TemporaryDirectory() as folder:
        cut, source = (
            CutOptions({"N_h": args.history, "N_t": args.targets}),
            {"kind": "callable", "name": "sequence_o1"},
        )
        bundle = export_module(model(), Path(folder) / "bundle", prove=prove, source=source, cut=cut)
        result = {
            "command": command(),
            "machine": machine(args.threads),
            "state": [dataclasses.asdict(s) for s in bundle.manifest.state],
            **_times(model, bundle, args),
        }
    tell(result, args.out)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--history", type=int, default=100_000)
    p.add_argument("--events", type=int, default=100, help="that are appended")
    p.add_argument("--last", type=int, default=100, help="recent events, which the second branch reads whole")
    p.add_argument("--targets", type=int, default=300)
    p.add_argument("--narrow", type=int, default=128, help="width of the sketch")
    p.add_argument("--width", type=int, default=256, help="width of the attention")
    p.add_argument("--slots", type=int, default=1024)
    p.add_argument("--seconds", type=float, default=20.0, help="of measuring each call")
    p.add_argument("--threads", type=int)
    p.add_argument("--out")
    return p.parse_args()


def _times(model: GalleryModel, bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    request = model.request(args.history + args.events, args.targets)
    for name in ("items", "last"):
        request[name] = rng.integers(1, ITEMS, request[name].shape)
    growing = ("items", "actions")
    user = {n: request[n] for n in (*growing, "last")}
    targets = {"target": request["target"]}
    first = {**user, **{n: user[n][:, : args.history] for n in growing}}
    new = {**user, **{n: user[n][:, args.history :] for n in growing}}
    session = Session.load(bundle.path, threads=args.threads)
    session.score(Request({**first, **targets}, "kept", 0))
    kept = session._store.memory.find("kept")
    assert kept is not None

    def append() -> None:
        session._store.put(*kept)  # the state before, so that each append is the first
        assert session.append("kept", new, 1, after=0)

    def anew() -> None:
        session.forget("anew")
        assert session.warm("anew", user, 1)

    append()
    anew()
    appended, whole = (session.score(Request(targets, u, 1)) for u in ("kept", "anew"))

    def hit() -> None:
        session.score(Request(targets, "kept", 1))

    def first_hit() -> None:
        append()
        hit()

    calls = {"append": append, "anew": anew, "first": first_hit, "hit": hit}
    taken = measure_in_turn(calls, args.seconds)
    ms = {n: float(np.median(t)) * 1e3 for n, t in taken.items()}
    print({n: round(t, 2) for n, t in ms.items()}, file=sys.stderr)
    return {
        "ms": ms,
        "calls": {n: len(t) for n, t in taken.items()},
        "append_share": ms["append"] / ms["anew"],
        "with_finishing_share": (ms["first"] - ms["hit"]) / ms["anew"],
        "error": _error(appended, whole),
        "state_bytes": session.stats().state_bytes // session.stats().users,
    }


def _error(appended: Array, whole: Array) -> dict[str, float]:
    """Of the scores after an append, against those of the state made anew: of roundings in another order alone."""
    most, scale = float(np.abs(appended - whole).max()), float(np.abs(whole).max())
    return {"max_abs": most, "scale": scale, "in_roundings": most / (scale * float(np.finfo(np.float32).eps))}


if __name__ == "__main__":
    main()
