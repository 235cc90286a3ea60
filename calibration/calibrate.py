"""Which parts of a user state can be kept in 8 bits without the ranking moving: tried on a trace, under a budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnx

from stca import folders
from stca.arrays import Array, Progress
from stca.bundle import Bundle, place_for, scratch, seal, writing
from stca.calibration.collectors import Collector, Granularity, Method
from stca.calibration.quality import Budget, Measure, measure
from stca.calibration.quantized_state import Kind, StateFormat, levels, quantizable, quantize
from stca.errors import ParityError, StcaError, UsageError
from stca.manifest import HALVES, ITEM_BYTES, TOKENS, Manifest, StateSpec, TensorSpec
from stca.trace import Traced

# Requests on which each tensor is tried alone, to know which to keep as it is first.
_ALONE: Final = 16


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
    """How a state is quantized.

    Attributes:
        kind: int8 or fp8.
        granularity: what has a scale of its own; all but `token` are constants, taken from the trace by `method`.
        method: how a range is chosen; of `token` it is absmax.
    """

    kind: Kind
    granularity: Granularity = "token"
    method: Method = "absmax"


@dataclass(frozen=True)
class Tried:
    """One choice of tensors, and what came of it.

    Attributes:
        quantized: the tensors in 8 bits. high: those that could be, and were kept as they are.
        ratio: bytes of the state's rows, of float32's.
        measures: against the budget.
        largest: largest difference of a score.
    """

    quantized: tuple[str, ...]
    high: tuple[str, ...]
    ratio: float
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
    """Write a bundle whose state is in 8 bits as far as the budget allows.

    All tensors are tried first; while the budget breaks, the one that alone moves the scores most is kept as it is.

    Args:
        bundle: in float32, with its own graphs.
        trace: begins the trace anew; each request is looked at alone, so it may be longer than memory.
        options: of the new state.
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
    candidates = _candidates(bundle)
    if os.path.realpath(out) == os.path.realpath(bundle.path):
        raise UsageError(f"{out}: is the bundle to calibrate, which is compared with the new one; name another place")
    place_for(out)
    progress("float32 on the trace")
    labels = [r.labels for r in trace()] if budget.auc is not None else []
    if budget.auc is not None and all(x is None for x in labels):
        raise UsageError("--budget: auc needs labels, and the trace has none; add labels, or bound top10 alone")
    exact = list(run.scores(bundle, trace()))
    measure(exact, exact, labels, tasks, budget)  # what the trace lacks is said before the long work
    progress("ranges of the state")
    formats = formats_of(bundle, candidates, options, run.states(bundle, trace()))
    tried: list[Tried] = []
    high: list[str] = []
    order: list[str] = []
    while True:
        chosen = {n: f for n, f in formats.items() if n not in high}
        progress(f"{options.kind} in {len(chosen)} of {len(formats)} tensors of the state")
        made, found = _scored(bundle, chosen, run, trace())
        measures = measure(exact, found, labels, tasks, budget)
        tried.append(_tried(bundle, made, chosen, tuple(high), measures, exact, found))
        if not tried[-1].broken:
            break
        if len(chosen) == 1:
            raise ParityError(_blamed(bundle, next(iter(chosen)), options, tried[-1]))
        order = order or _by_harm(bundle, formats, trace, run, exact, progress)
        high.append(next(n for n in order if n not in high))
    if not tried[-1].holds:
        raise UsageError(_too_small(tried[-1], len(exact)))
    return _finished(bundle, chosen, out, budget, tried, len(exact), prove, progress), tried


def _candidates(bundle: Bundle) -> tuple[StateSpec, ...]:
    if bundle.manifest.quantization is not None:
        raise UsageError(f"{bundle.path}: is quantized already; calibrate the bundle that it was made from")
    if summed := next((s.name for s in bundle.manifest.state if s.append), None):
        raise UsageError(
            f"{bundle.path}: its state {summed!r} is a sum that is added to, and is of one size whatever the history; "
            "there is nothing to gain in 8 bits"
        )
    if not (found := quantizable(bundle.manifest.state)):
        raise UsageError(
            f"{bundle.path}: its state has no computed float32 tensor with several values a row, so there is nothing "
            "to quantize"
        )
    return found


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
    formats: Mapping[str, StateFormat],
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


def _scored(
    bundle: Bundle, formats: Mapping[str, StateFormat], run: Runner, requests: Iterable[Traced]
) -> tuple[Manifest, list[Array]]:
    """What a bundle with tensors in other formats says of itself and scores; it is gone afterwards."""
    with scratch("stca-calibrate") as folder:
        made = write_quantized(bundle, formats, folder / "tried")
        return made.manifest, list(run.scores(made, requests))


def write_quantized(bundle: Bundle, formats: Mapping[str, StateFormat], folder: Path) -> Bundle:
    """Write a bundle with tensors of its state in other formats as a new directory; nothing is proven of it.

    Args:
        bundle: in float32.
        formats: of those tensors that change, by name; all of one kind.
        folder: to make.
    """
    folder.mkdir()
    return seal(folder, _write(bundle, formats, folder))


def _write(bundle: Bundle, formats: Mapping[str, StateFormat], folder: Path) -> Manifest:
    """Write the files of a quantized bundle; engines are left behind, they have the old state."""
    manifest = bundle.manifest
    halves = {half: onnx.load(bundle.file(half), load_external_data=False) for half in HALVES}
    state = quantize(halves["user_encoder"], halves["target_scorer"], manifest.state, formats)
    engines = {name for e in manifest.engines for name in (e.file, str(Path(e.file).with_suffix(".weights")))}
    own = {graph.file for graph in manifest.graphs.values()}
    rewritten = {manifest.graphs[half].file for half in HALVES}
    for name in manifest.names - rewritten - (engines - own):
        folders.share(bundle.path / name, folder / name)
    graphs = dict(manifest.graphs)
    for half, model in halves.items():
        file = folder / manifest.graphs[half].file
        onnx.save(model, file)
        onnx.checker.check_model(str(file), full_check=True)
    new = [TensorSpec(s.name, s.dtype, s.shape) for s in state]
    encoder, scorer = graphs["user_encoder"], graphs["target_scorer"]
    old = {s.name for s in manifest.state}
    inputs = [i for i in scorer.inputs if i.name not in old]
    graphs["user_encoder"] = dataclasses.replace(encoder, outputs=tuple(new))
    graphs["target_scorer"] = dataclasses.replace(scorer, inputs=(*new, *inputs))
    return dataclasses.replace(manifest, graphs=graphs, state=state, engines=(), quantization=_told(formats))


def _tried(
    bundle: Bundle,
    made: Manifest,
    chosen: Mapping[str, StateFormat],
    high: tuple[str, ...],
    measures: Sequence[Measure],
    exact: Sequence[Array],
    found: Sequence[Array],
) -> Tried:
    largest = max(float(np.abs(x - y).max(initial=0.0)) for x, y in zip(exact, found, strict=True))
    ratio = state_bytes(made) / state_bytes(bundle.manifest)
    return Tried(tuple(chosen), high, ratio, tuple(measures), largest)


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
    chosen: Mapping[str, StateFormat],
    out: str | os.PathLike[str],
    budget: Budget,
    tried: Sequence[Tried],
    requests: int,
    prove: Callable[[Bundle], Mapping[str, Any]],
    progress: Progress,
) -> Bundle:
    told = {
        **(_told(chosen) or {}),
        "budget": {"auc": budget.auc, "top": {str(k): x for k, x in budget.top.items()}},
        "requests": requests,
        "found": tried[-1].as_dict(),
    }
    with writing(out) as (work, commit):
        progress("writing the bundle")
        split = bundle.manifest.split
        manifest = _write(bundle, chosen, work)
        rows = sum(s.bytes_per_token for s in manifest.state)
        split = {**split, "bytes_per_token": rows, "state_bytes": state_bytes(manifest, _tokens(split))}
        manifest = dataclasses.replace(manifest, quantization=told, split=split, parity={})
        parity = prove(seal(work, manifest))
        return commit(dataclasses.replace(manifest, parity=parity))


def _told(formats: Mapping[str, StateFormat]) -> dict[str, Any] | None:
    if not formats:
        return None
    first = next(iter(formats.values()))
    return {"state": {"kind": first.kind, "granularity": first.granularity, "tensors": list(formats)}}


def _tokens(split: Mapping[str, Any]) -> int:
    return int(split.get("workload", {}).get(TOKENS, 10_000))


def _maker(bundle: Bundle, name: str) -> str:
    """The node of the user encoder that makes a tensor of the state, for a message."""
    graph = onnx.load(bundle.file("user_encoder"), load_external_data=False).graph
    node = next((n for n in graph.node if name in n.output), None)
    return f"node {node.name or node.output[0]!r} ({node.op_type})" if node is not None else "no node"


def _blamed(bundle: Bundle, name: str, options: Options, tried: Tried) -> str:
    worst = next(m for m in tried.measures if m.verdict == "broken")
    return (
        f"no tensor of the state can be {options.kind} under the budget: {name!r}, made by {_maker(bundle, name)}, "
        f"alone gives {worst.name} {worst.estimate.value:+.6f}, allowed {worst.bound:g}; loosen --budget or change "
        "--granularity"
    )


def _too_small(tried: Tried, requests: int) -> str:
    worst = max((m for m in tried.measures if m.verdict == "undecided"), key=lambda m: m.requests_needed(requests))
    e, needed = worst.estimate, worst.requests_needed(requests)
    return (
        f"the trace is too small to decide: {worst.name} is {e.value:+.6f}, between {e.low:+.6f} and {e.high:+.6f}, "
        f"the budget allows {worst.bound:g}; record about {needed} requests, now {requests}"
    )
