"""Which parts of a state and of the weights can be kept in 8 bits without the ranking moving: tried on a trace, under a
budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import onnx

from stca.arrays import Array, Progress
from stca.bundle import Bundle, place_for, scratch, seal, writing
from stca.calibration.collectors import Collector, Granularity, Method
from stca.calibration.quality import Budget, Measure, measure
from stca.calibration.quantized_bundle import Formats, formats_told, weights_bytes, write_files, write_quantized
from stca.calibration.quantized_state import Kind, StateFormat, levels, quantizable
from stca.calibration.quantized_weights import LEAST_TABLE, RowFormat, quantizable_files, quantizable_tables
from stca.errors import ParityError, StcaError, UsageError
from stca.manifest import HALVES, ITEM_BYTES, TOKENS, Manifest, StateSpec
from stca.trace import Traced

# Requests on which each tensor is tried alone, to know which to keep as it is first.
_ALONE: Final = 16
# In how many steps the tensors are given up, where there are many.
_TRIES: Final = 8


class Runner(Protocol):
    """Runs bundles on a trace; `stca.checks.trace_runs` has one."""

    def scores(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Array]:
        """Scores `(targets, tasks)` of each request."""
        ...

    def states(self, bundle: Bundle, requests: Iterable[Traced]) -> Iterator[Mapping[str, Array]]:
        """The user state of each request, by tensor."""
        ...


@dataclass(frozen=True)
class Options:
    """What is quantized, and how.

    Attributes:
        kind: int8 or fp8, of the state; None leaves it.
        granularity: what has a scale of its own; all but `token` are constants, taken from the trace by `method`.
        method: how a range is chosen; of `token` it is absmax.
        tables: of the embedding tables' rows; None leaves them. Those in graphs can be int8 alone.
    """

    kind: Kind | None
    granularity: Granularity = "token"
    method: Method = "absmax"
    tables: Kind | None = None


@dataclass(frozen=True)
class Tried:
    """One choice of tensors, and what came of it.

    Attributes:
        quantized: the tensors in 8 bits, of the state and of the weights. high: those that could be, and were kept as
            they are.
        ratio, weights_ratio: bytes of the state's rows, and of weights and tables, of float32's.
        measures: against the budget.
        largest: largest difference of a score.
    """

    quantized: tuple[str, ...]
    high: tuple[str, ...]
    ratio: float
    weights_ratio: float
    measures: tuple[Measure, ...]
    largest: float

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
    many an eighth of them.

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
    weights = _weights(bundle, options)
    candidates = _candidates(bundle, options, weights)
    if os.path.realpath(out) == os.path.realpath(bundle.path):
        raise UsageError(f"{out}: is the bundle to calibrate, which is compared with the new one; name another place")
    place_for(out)
    progress("float32 on the trace")
    labels = [r.labels for r in trace()] if budget.auc is not None else []
    if budget.auc is not None and all(x is None for x in labels):
        raise UsageError("--budget: auc needs labels, and the trace has none; add labels, or bound top10 alone")
    exact = list(run.scores(bundle, trace()))
    measure(exact, exact, labels, tasks, budget)  # what the trace lacks is said before the long work
    formats: dict[str, StateFormat | RowFormat] = dict(weights)
    if candidates:
        progress("ranges of the state")
        formats |= formats_of(bundle, candidates, options, run.states(bundle, trace()))
    step = -(-len(formats) // _TRIES)
    tried: list[Tried] = []
    high: list[str] = []
    order: list[str] = []
    while True:
        chosen = {n: f for n, f in formats.items() if n not in high}
        progress(f"8 bits in {len(chosen)} of {len(formats)} tensors")
        made, found = _scored(bundle, chosen, run, trace())
        measures = measure(exact, found, labels, tasks, budget)
        tried.append(_tried(bundle, made, chosen, tuple(high), measures, exact, found))
        if not tried[-1].broken:
            break
        if len(chosen) == 1:
            raise ParityError(_blamed(bundle, next(iter(chosen)), formats, tried[-1]))
        order = order or _by_harm(bundle, formats, trace, run, exact, progress)
        high = order[: min(len(high) + step, len(order) - 1)]
    if not tried[-1].holds:
        raise UsageError(_too_small(tried[-1], len(exact)))
    return _finished(bundle, chosen, out, budget, tried, len(exact), prove, progress), tried


def _candidates(bundle: Bundle, options: Options, weights: Mapping[str, RowFormat]) -> tuple[StateSpec, ...]:
    """The tensors of the state to quantize."""
    summed = next((s.name for s in bundle.manifest.state if s.append), None)
    if options.kind is not None and summed is not None:
        raise UsageError(
            f"{bundle.path}: its state {summed!r} is a sum that is added to, and is of one size whatever the history; "
            "there is nothing to gain in 8 bits"
        )
    found = quantizable(bundle.manifest.state) if options.kind is not None else ()
    if options.kind is not None and not (found or weights):
        raise UsageError(
            f"{bundle.path}: its state has no computed float32 tensor with several values a row, so there is nothing "
            "to quantize"
        )
    return found


def _weights(bundle: Bundle, options: Options) -> dict[str, RowFormat]:
    """The tables to quantize, and how."""
    if bundle.manifest.quantization is not None:
        raise UsageError(f"{bundle.path}: is quantized already; calibrate the bundle that it was made from")
    if options.kind is None and options.tables is None:
        raise UsageError("nothing is to be quantized; ask for 8 bits of the state or of the tables")
    if options.tables is None:
        return {}
    files = quantizable_files(bundle.manifest.tables or ())
    graphs = [onnx.load(bundle.file(name), load_external_data=False) for name in bundle.manifest.graphs]
    inside = quantizable_tables(graphs)
    if options.tables == "fp8" and inside:
        raise UsageError(
            f"--tables fp8: table {inside[0]!r} is in the graphs, where ONNX looks up no 8-bit floats; take int8, or "
            "export with --tables-above, so that tables leave the graphs"
        )
    if not (files or inside):
        raise UsageError(
            f"{bundle.path}: has no embedding table in float32 of 8 numbers a row or more and over "
            f"{LEAST_TABLE >> 10} KiB that is read by look-ups alone, so --tables has nothing to quantize"
        )
    return dict.fromkeys((*files, *inside), RowFormat(options.tables))


def formats_of(
    bundle: Bundle, candidates: Sequence[StateSpec], options: Options, states: Iterable[Mapping[str, Array]]
) -> dict[str, StateFormat]:
    """How each of a state's tensors is to be kept, by name.

    Args:
        bundle: whose state, for messages.
        candidates: the tensors.
        options: of all of them.
        states: of a trace's users.

    Raises:
        UsageError: when a state holds NaN, naming the tensor and its node, or there is none.
    """
    if options.kind is None:
        return {}
    collectors = {s.name: Collector(options.granularity) for s in candidates}
    for state in states:
        for name, collector in collectors.items():
            try:
                collector.add(state[name])
            except StcaError as e:
                raise UsageError(f"state {name!r} (made by {_maker(bundle, name)}) {e}") from e
    method = "absmax" if options.granularity == "token" else options.method
    made = {}
    for name, collector in collectors.items():
        try:
            ranges = collector.ranges(method, levels(options.kind))
        except StcaError as e:
            raise UsageError(f"state {name!r}: {e}") from e
        made[name] = StateFormat(options.kind, options.granularity, ranges)
    return made


def _by_harm(
    bundle: Bundle,
    formats: Formats,
    trace: Callable[[], Iterable[Traced]],
    run: Runner,
    exact: Sequence[Array],
    progress: Progress,
) -> list[str]:
    """The tensors, first the one that alone moves the scores most."""
    harm: dict[str, float] = {}
    for name, format in formats.items():
        progress(f"{name} alone")
        _, found = _scored(bundle, {name: format}, run, itertools.islice(trace(), _ALONE))
        moved = [np.square(x - y).mean() for x, y in zip(found, exact, strict=False)]
        harm[name] = float(np.mean(moved))
    return sorted(harm, key=lambda n: -harm[n])


def _scored(bundle: Bundle, formats: Formats, run: Runner, requests: Iterable[Traced]) -> tuple[Manifest, list[Array]]:
    """What a bundle with tensors in other formats says of itself and scores; it is gone afterwards."""
    with scratch("stca-calibrate") as folder:
        made = write_quantized(bundle, formats, folder / "tried")
        return made.manifest, list(run.scores(made, requests))


def _tried(
    bundle: Bundle,
    made: Manifest,
    chosen: Formats,
    high: tuple[str, ...],
    measures: Sequence[Measure],
    exact: Sequence[Array],
    found: Sequence[Array],
) -> Tried:
    largest = max(float(np.abs(x - y).max(initial=0.0)) for x, y in zip(exact, found, strict=True))
    ratio = state_bytes(made) / state_bytes(bundle.manifest)
    weights = weights_bytes(made) / max(1, weights_bytes(bundle.manifest))
    return Tried(tuple(chosen), high, ratio, weights, tuple(measures), largest)


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


def _maker(bundle: Bundle, name: str) -> str:
    """The node of the user encoder that makes a tensor of the state, for a message."""
    graph = onnx.load(bundle.file("user_encoder"), load_external_data=False).graph
    node = next((n for n in graph.node if name in n.output), None)
    return f"node {node.name or node.output[0]!r} ({node.op_type})" if node is not None else "no node"


def _reader(bundle: Bundle, name: str) -> str:
    """A node that reads a weight, for a message."""
    graphs = (onnx.load(bundle.file(half), load_external_data=False).graph for half in HALVES)
    node = next((n for graph in graphs for n in graph.node if name in n.input), None)
    return f"node {node.name or node.output[0]!r} ({node.op_type})" if node is not None else "the runtime"


def _blamed(bundle: Bundle, name: str, formats: Formats, tried: Tried) -> str:
    worst = next(m for m in tried.measures if m.verdict == "broken")
    of_state = isinstance(formats[name], StateFormat)
    where = f"made by {_maker(bundle, name)}" if of_state else f"read by {_reader(bundle, name)}"
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
