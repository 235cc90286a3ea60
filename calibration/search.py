"""The search under a budget: which parts stay as they are so that the ranking holds.

Errors of parts add up, nearly. So the parts are put in one order, by what each costs alone for the bytes that it saves.
The search is for how many of them, the cheapest first: of a hundred, that takes eight looks at the whole trace.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx

from stca.arrays import Array, Progress
from stca.bundle import Bundle, scratch
from stca.calibration.choices import Runner, maker_of
from stca.calibration.quality import Measure
from stca.calibration.quantized_bundle import Formats, state_bytes, weights_bytes, write_quantized
from stca.calibration.quantized_products import WEIGHT_MOVES
from stca.calibration.quantized_state import StateFormat
from stca.errors import ParityError, UsageError
from stca.export.analysis.scope import label
from stca.manifest import Manifest
from stca.specs import HALVES
from stca.trace import Traced

# Requests on which each part is tried alone: of an order, a few targets tell as much as many.
_ALONE: Final = 8


@dataclass(frozen=True)
class Part:
    """A tensor of the state or of the weights that can be in 8 bits, tried alone.

    Attributes:
        name: of the tensor. node: the one that makes it, or that reads a weight.
        rms: how much it moves a score: root mean square.
        saved: bytes that it saves, of one user's state and of the weights.
    """

    name: str
    node: str
    rms: float
    saved: int


@dataclass(frozen=True)
class Tried:
    """One choice of tensors, and what came of it.

    Attributes:
        quantized: the tensors in 8 bits, of the state and of the weights. high: those that could be, and were kept as
            they are.
        bytes: of a user's state, of weights and of tables.
        ratio, weights_ratio: bytes of the state's rows, and of weights and tables, of float32's.
        measures: against the budget.
        largest, rms: difference of a score.
    """

    quantized: tuple[str, ...]
    high: tuple[str, ...]
    bytes: int
    ratio: float
    weights_ratio: float
    measures: tuple[Measure, ...]
    largest: float
    rms: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether every bound surely holds."""
        return all(m.verdict == "holds" for m in self.measures)

    @property
    def broken(self) -> bool:
        """Whether an estimate is itself over its bound."""
        return any(m.verdict == "broken" for m in self.measures)

    @property
    def verdict(self) -> str:
        """`holds`, `broken` or, between them, `undecided`."""
        return "holds" if self.holds else "broken" if self.broken else "undecided"

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        measures = [{**dataclasses.asdict(m), "verdict": m.verdict} for m in self.measures]
        return {**dataclasses.asdict(self), "measures": measures, "holds": self.holds, "verdict": self.verdict}


@dataclass(frozen=True)
class Found:
    """What a search did.

    Attributes:
        formats: of the tensors that go to 8 bits.
        tried: each choice, the one that was taken last.
        parts: each alone, the cheapest first; empty where all of them held together.
        requests: of the trace.
        float32_bytes: of a user's state, of weights and of tables, as they were.
    """

    formats: Formats
    tried: tuple[Tried, ...]
    parts: tuple[Part, ...]
    requests: int
    float32_bytes: int

    @property
    def taken(self) -> Tried:
        """The choice that holds the budget, with the most tensors in 8 bits."""
        return self.tried[-1]

    @property
    def left_open(self) -> str | None:
        """What more requests might decide, as a sentence."""
        more = [t for t in self.tried if t.verdict == "undecided" and len(t.quantized) > len(self.taken.quantized)]
        if not more:
            return None
        most = max(more, key=lambda t: len(t.quantized))
        needed = _worst(most, self.requests).requests_needed(self.requests)
        return (
            f"{len(most.quantized)} tensors in 8 bits are neither within the budget nor over it, as far as this trace "
            f"tells; record about {needed} requests, now {self.requests}, to decide"
        )

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        parts = [dataclasses.asdict(p) for p in self.parts]
        told = {"parts": parts, "left_open": self.left_open, "float32_bytes": self.float32_bytes}
        return {"tried": [t.as_dict() for t in self.tried], **told}


@dataclass
class Search:
    """What a search needs.

    Attributes:
        bundle: in float32.
        formats: of all that can be in 8 bits.
        trace: begins the trace anew.
        run: what computes scores.
        exact: scores of the trace in float32.
        judged: measures scores against the budget.
        progress: told each step as it starts.
    """

    bundle: Bundle
    formats: Formats
    trace: Callable[[], Iterable[Traced]]
    run: Runner
    exact: Sequence[Array]
    judged: Callable[[Sequence[Array]], Sequence[Measure]]
    progress: Progress

    def found(self) -> Found:
        """The most parts, of the cheapest first, that hold the budget.

        Raises:
            UsageError: when the trace cannot decide on any of them.
            ParityError: when even the cheapest breaks the budget, naming it and its node.
        """
        order = list(self.formats)
        tried = [self._tried(order, "")]
        requests, before = len(self.exact), _bytes(self.bundle.manifest)
        if tried[0].holds:
            return Found(self.formats, tuple(tried), (), requests, before)
        parts = self._parts()
        order = [p.name for p in parts]
        holds, fails = 0, len(order)
        while fails - holds > 1:
            many = (holds + fails) // 2
            left = math.ceil(math.log2(fails - holds))
            tried.append(self._tried(order[:many], f", at most {left} {'try' if left == 1 else 'tries'} left"))
            holds, fails = (many, fails) if tried[-1].holds else (holds, many)
        if not holds:
            undecided = next((t for t in tried if not t.broken), None)
            if undecided is not None:
                raise UsageError(_too_small(undecided, requests))
            raise ParityError(_blamed(parts[0], self.formats, tried[-1]))
        tried.sort(key=lambda t: (t.holds, len(t.quantized)))
        return Found({n: self.formats[n] for n in order[:holds]}, tuple(tried), tuple(parts), requests, before)

    def _parts(self) -> list[Part]:
        """Each part alone, the least error for the bytes that it saves first."""
        parts, before = [], _bytes(self.bundle.manifest)
        for i, name in enumerate(self.formats, 1):
            self.progress(f"{name} alone ({i} of {len(self.formats)})")
            made, found = self._scored([name], itertools.islice(self.trace(), _ALONE))
            off = [x - y for x, y in zip(found, self.exact, strict=False)]
            parts.append(Part(name, self._node(name), _rms(off), before - _bytes(made)))
        return sorted(parts, key=lambda p: p.rms**2 / max(1, p.saved))

    def _tried(self, names: Sequence[str], left: str) -> Tried:
        self.progress(f"8 bits in {len(names)} of {len(self.formats)} tensors{left}")
        made, found = self._scored(names, self.trace())
        off = [np.abs(x - y) for x, y in zip(self.exact, found, strict=True)]
        before = self.bundle.manifest
        return Tried(
            quantized=tuple(n for n in self.formats if n in names),
            high=tuple(n for n in self.formats if n not in names),
            bytes=_bytes(made),
            ratio=state_bytes(made) / max(1, state_bytes(before)),
            weights_ratio=weights_bytes(made) / max(1, weights_bytes(before)),
            measures=tuple(self.judged(found)),
            largest=max(float(x.max(initial=0.0)) for x in off),
            rms=_rms(off),
        )

    def _scored(self, names: Iterable[str], requests: Iterable[Traced]) -> tuple[Manifest, list[Array]]:
        """What a bundle with tensors in 8 bits says of itself and scores; it is gone afterwards."""
        with scratch("stca-calibrate") as folder:
            made = write_quantized(self.bundle, {n: self.formats[n] for n in names}, folder / "tried")
            return made.manifest, list(self.run.scores(made, requests))

    def _node(self, name: str) -> str:
        """The node that makes a tensor of the state, or that reads a weight."""
        if isinstance(self.formats[name], StateFormat):
            return maker_of(self.bundle, name)
        for half in HALVES:
            same = {name}
            for node in onnx.load(self.bundle.file(half), load_external_data=False).graph.node:
                if same.isdisjoint(node.input):
                    continue
                if node.op_type not in WEIGHT_MOVES:
                    return f"node {label(node)!r} ({node.op_type})"
                same.update(node.output)
        return "the runtime"


def _rms(off: Iterable[Array]) -> float:
    """The root of the mean of each request's mean square; a request without targets tells nothing."""
    return math.sqrt(np.mean([np.square(x).mean() for x in off if x.size] or [0.0]))


def _bytes(manifest: Manifest) -> int:
    return state_bytes(manifest) + weights_bytes(manifest)


def _blamed(part: Part, formats: Formats, tried: Tried) -> str:
    worst = next(m for m in tried.measures if m.verdict == "broken")
    format = formats[part.name]
    of_state = isinstance(format, StateFormat)
    scales = f" with a scale for each {format.granularity}" if isinstance(format, StateFormat) else ""
    what = "tensor of the state" if all(isinstance(f, StateFormat) for f in formats.values()) else "tensor"
    return (
        f"no {what} can be {format.kind} under the budget: {part.name!r}{scales}, "
        f"{'made' if of_state else 'read'} by {part.node}, "
        f"alone gives {worst.name} {worst.told(worst.estimate.value)}, allowed {worst.allows}; loosen --budget"
        f"{' or change --granularity' if of_state else ''}"
    )


def _worst(tried: Tried, requests: int) -> Measure:
    return max((m for m in tried.measures if m.verdict == "undecided"), key=lambda m: m.requests_needed(requests))


def _too_small(tried: Tried, requests: int) -> str:
    worst = _worst(tried, requests)
    e, needed = worst.estimate, worst.requests_needed(requests)
    value, low, high = map(worst.told, (e.value, e.low, e.high))
    return (
        f"the trace is too small to decide: {worst.name} is {value}, between {low} and {high}, "
        f"the budget allows {worst.allows}; record about {needed} requests, now {requests}"
    )
