"""Which parts of a state and of the weights can be kept in 8 bits without the ranking moving: tried on a trace, under a
budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import onnx

from stca.arrays import Array, Progress
from stca.bundle import Bundle, place_for, scratch, seal, writing
from stca.calibration.choices import (
    Options,
    Runner,
    formats_of,
    maker_of,
    state_choices,
    weight_choices,
    with_ranges,
)
from stca.calibration.quality import Budget, Measure, measure
from stca.calibration.quantized_bundle import Formats, formats_told, weights_bytes, write_files, write_quantized
from stca.calibration.quantized_state import StateFormat
from stca.errors import ParityError, UsageError
from stca.manifest import HALVES, ITEM_BYTES, TOKENS, Manifest
from stca.trace import Traced

# Requests on which each tensor is tried alone, to know which to keep as it is first.
_ALONE: Final = 16
# In how many steps the tensors are given up, where there are many.
_TRIES: Final = 8


@dataclass(frozen=True)
class Tried:
    """One choice of tensors, and what came of it.

    Attributes:
        quantized: the tensors in 8 bits, of the state and of the weights. high: those that could be, and were kept as
            they are.
        ratio, weights_ratio: bytes of the state's rows, and of weights and tables, of float32's.
        measures: against the budget.
        largest, rms: difference of a score.
        harm: mean square difference of a score with each tensor alone in 8 bits; empty until a try broke the budget.
    """

    quantized: tuple[str, ...]
    high: tuple[str, ...]
    ratio: float
    weights_ratio: float
    measures: tuple[Measure, ...]
    largest: float
    rms: float = 0.0
    harm: Mapping[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every bound surely holds."""
        return all(m.verdict == "holds" for m in self.measures)

    @property
    def broken(self) -> bool:
        """Whether an estimate is itself over its bound."""
        return any(m.verdict == "broken" for m in self.measures)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        measures = [{**dataclasses.asdict(m), "verdict": m.verdict} for m in self.measures]
        return {**dataclasses.asdict(self), "measures": measures, "holds": self.holds}


def calibrate(
    bundle: Bundle,
    trace: Callable[[], Iterable[Traced]],
    *,
    options: Options,
    budget: Budget,
    out: str | os.PathLike[str],
    run: Runner,
    tasks: Sequence[str],
    prove: Callable[[Bundle], Mapping[str, Any]],
    progress: Progress = lambda _: None,
) -> tuple[Bundle, list[Tried]]:
    """Write a bundle that is in 8 bits as far as the budget allows.

    All tensors are tried first; while the budget breaks, the one that alone moves the scores most is kept as it is, of
    many an eighth of them. Where the trace leaves it open, that is done once: more would give up tensors for want of
    requests.

    Args:
        bundle: in float32, with its own graphs.
        trace: begins the trace anew; each request is looked at alone, so it may be longer than memory.
        options: what becomes of it.
        budget: how far the ranking may move.
        out: where the new bundle goes.
        run: what computes scores and states.
        tasks: names of the scores' columns.
        prove: runs on the finished bundle before it gets its name, as for an export; its report is kept.
        progress: told each step as it starts.

    Returns:
        The bundle, and all that was tried, the one that was taken last.

    Raises:
        UsageError: when the trace cannot decide, or there is nothing to quantize.
        ParityError: when no tensor can be in 8 bits under the budget, naming the one to blame and the node it is from.
    """
    weights = weight_choices(bundle, options)
    candidates = state_choices(bundle, options, weights)
    if os.path.realpath(out) == os.path.realpath(bundle.path):
        raise UsageError(f"{out}: is the bundle to calibrate, which is compared with the new one; name another place")
    place_for(out)
    progress("float32 on the trace")
    labels = [r.labels for r in trace()] if budget.auc is not None else []
    if budget.auc is not None and all(x is None for x in labels):
        raise UsageError("--budget: auc needs labels, and the trace has none; add labels, or bound top10 alone")
    exact = list(run.scores(bundle, trace()))
    measure(exact, exact, labels, tasks, budget)  # what the trace lacks is said before the long work
    formats = dict(weights)
    if options.weights and options.activations == "tensor":
        progress("ranges of activations")
        formats |= with_ranges(bundle, formats, options.method, run, trace())
    if candidates:
        progress("ranges of the state")
        formats |= formats_of(bundle, candidates, options, run.states(bundle, trace()))
    judged = partial(measure, exact, labels=labels, tasks=tasks, budget=budget)
    chosen, tried = _searched(bundle, formats, trace, run, exact, judged, progress)
    return _finished(bundle, chosen, out, budget, tried, len(exact), prove, progress), tried


def _searched(
    bundle: Bundle,
    formats: Formats,
    trace: Callable[[], Iterable[Traced]],
    run: Runner,
    exact: Sequence[Array],
    judged: Callable[[Sequence[Array]], Sequence[Measure]],
    progress: Progress,
) -> tuple[Formats, list[Tried]]:
    """Those of `formats` that hold the budget, and all that was tried; `judged` measures scores against it."""
    step = -(-len(formats) // _TRIES)
    tried: list[Tried] = []
    high: list[str] = []
    harm: dict[str, float] = {}
    while True:
        chosen = {n: f for n, f in formats.items() if n not in high}
        progress(f"8 bits in {len(chosen)} of {len(formats)} tensors")
        made, found = _scored(bundle, chosen, run, trace())
        tried.append(_tried(bundle, made, chosen, judged(found), exact, found, harm))
        if tried[-1].holds:
            return chosen, tried
        open_ = [t for t in tried if not t.broken]
        if open_ and (len(open_) > 1 or len(chosen) == 1):
            raise UsageError(_too_small(open_[0], len(exact)))
        if len(chosen) == 1:
            raise ParityError(_blamed(bundle, next(iter(chosen)), formats, tried[-1]))
        harm = harm or _harm(bundle, formats, trace, run, exact, progress)
        order = sorted(harm, key=lambda n: -harm[n])
        high = order[: min(len(high) + step, len(order) - 1)]


def _harm(
    bundle: Bundle,
    formats: Formats,
    trace: Callable[[], Iterable[Traced]],
    run: Runner,
    exact: Sequence[Array],
    progress: Progress,
) -> dict[str, float]:
    """How much each tensor alone moves the scores."""
    harm: dict[str, float] = {}
    for name, format in formats.items():
        progress(f"{name} alone")
        _, found = _scored(bundle, {name: format}, run, itertools.islice(trace(), _ALONE))
        moved = [np.square(x - y).mean() for x, y in zip(found, exact, strict=False)]
        harm[name] = float(np.mean(moved))
    return harm


def _scored(bundle: Bundle, formats: Formats, run: Runner, requests: Iterable[Traced]) -> tuple[Manifest, list[Array]]:
    """What a bundle with tensors in other formats says of itself and scores; it is gone afterwards."""
    with scratch("stca-calibrate") as folder:
        made = write_quantized(bundle, formats, folder / "tried")
        return made.manifest, list(run.scores(made, requests))


def _tried(
    bundle: Bundle,
    made: Manifest,
    chosen: Formats,
    measures: Sequence[Measure],
    exact: Sequence[Array],
    found: Sequence[Array],
    harm: Mapping[str, float],
) -> Tried:
    off = [np.abs(x - y) for x, y in zip(exact, found, strict=True)]
    largest, rms = max(float(x.max(initial=0.0)) for x in off), math.sqrt(np.mean([np.square(x).mean() for x in off]))
    ratio = state_bytes(made) / state_bytes(bundle.manifest)
    weights = weights_bytes(made) / max(1, weights_bytes(bundle.manifest))
    high = tuple(n for n in harm if n not in chosen)
    return Tried(tuple(chosen), high, ratio, weights, tuple(measures), largest, rms, dict(harm))


def state_bytes(manifest: Manifest, tokens: int = 10_000) -> int:
    """Bytes of a user's state at so many history tokens, its other sizes as the cut took them."""
    workload = manifest.split.get("workload", {})
    sizes = {**workload, TOKENS: min(tokens, manifest.max_history or tokens)}
    return sum(
        math.prod(n if isinstance(n, int) else int(sizes.get(n, 1)) for n in s.shape) * ITEM_BYTES[s.dtype]
        for s in manifest.state
    )


def _finished(
    bundle: Bundle,
    chosen: Formats,
    out: str | os.PathLike[str],
    budget: Budget,
    tried: Sequence[Tried],
    requests: int,
    prove: Callable[[Bundle], Mapping[str, Any]],
    progress: Progress,
) -> Bundle:
    told = {
        **(formats_told(chosen) or {}),
        "budget": {"auc": budget.auc, "top": {str(k): x for k, x in budget.top.items()}},
        "requests": requests,
        "found": tried[-1].as_dict(),
    }
    with writing(out) as (work, commit):
        progress("writing the bundle")
        split = bundle.manifest.split
        manifest = write_files(bundle, chosen, work)
        rows = sum(s.bytes_per_token for s in manifest.state)
        split = {**split, "bytes_per_token": rows, "state_bytes": state_bytes(manifest, _tokens(split))}
        manifest = dataclasses.replace(manifest, quantization=told, split=split, parity={})
        parity = prove(seal(work, manifest))
        return commit(dataclasses.replace(manifest, parity=parity))


def _tokens(split: Mapping[str, Any]) -> int:
    return int(split.get("workload", {}).get(TOKENS, 10_000))


def _reader(bundle: Bundle, name: str) -> str:
    """A node that reads a weight, for a message."""
    graphs = (onnx.load(bundle.file(half), load_external_data=False).graph for half in HALVES)
    node = next((n for graph in graphs for n in graph.node if name in n.input), None)
    return f"node {node.name or node.output[0]!r} ({node.op_type})" if node is not None else "the runtime"


def _blamed(bundle: Bundle, name: str, formats: Formats, tried: Tried) -> str:
    worst = next(m for m in tried.measures if m.verdict == "broken")
    of_state = isinstance(formats[name], StateFormat)
    where = f"made by {maker_of(bundle, name)}" if of_state else f"read by {_reader(bundle, name)}"
    what = "tensor of the state" if all(isinstance(f, StateFormat) for f in formats.values()) else "tensor"
    return (
        f"no {what} can be {formats[name].kind} under the budget: {name!r}, {where}, "
        f"alone gives {worst.name} {worst.estimate.value:+.6f}, allowed {worst.bound:g}; loosen --budget"
        f"{' or change --granularity' if of_state else ''}"
    )


def _too_small(tried: Tried, requests: int) -> str:
    worst = max((m for m in tried.measures if m.verdict == "undecided"), key=lambda m: m.requests_needed(requests))
    e, needed = worst.estimate, worst.requests_needed(requests)
    return (
        f"the trace is too small to decide: {worst.name} is {e.value:+.6f}, between {e.low:+.6f} and {e.high:+.6f}, "
        f"the budget allows {worst.bound:g}; record about {needed} requests, now {requests}"
    )
