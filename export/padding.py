"""Which inputs hold a history that is not packed, and how a shorter one is padded: found by asking the model.

What the model ignores is padding. So events are changed where a length, a mask or an id says that there are none: when
no score changes, and scores change with the other events, that is how the model takes a shorter history.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from stca import probe
from stca.arrays import Array
from stca.errors import SplitError
from stca.export.asking import Accepted, Child
from stca.export.histories import unpacked
from stca.specs import EventInput, Padding, TensorSpec

Run = Callable[[Mapping[str, Array]], list[Array] | str]
Side = Literal["left", "right"]
_EVENTS, _TARGETS = 6, 4  # of the requests asked, where the model leaves them free
_ROUNDING: Final = 1e-5


@dataclass(frozen=True)
class PadOptions:
    """What is known of a model's padding.

    Attributes:
        side: where it goes; None when only the model can tell.
        values: what it holds, by input; of all inputs under the empty name.
    """

    side: Side | None = None
    values: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What asking a model for its padding told.

    Attributes:
        padding: its histories that are not packed; None where there are none.
        inputs: of the request graph, with the ranges of lengths.
        told: a line on each history that the model does not take in any length as it is.
        needs: a line on each of a free length that needs an event: none is scored otherwise than padding alone.
    """

    padding: tuple[Padding, ...] | None
    inputs: tuple[TensorSpec, ...]
    told: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def padding_of(
    file: Path, known: Mapping[str, int], takes: Accepted, options: PadOptions, last: Collection[tuple[str, int]]
) -> Found:
    """`find_padding` of a graph, asked in a child process.

    Args:
        file: of the graph, its weights beside it.
        takes: what the graph takes.
        known, options, last: as `find_padding` takes them.
    """
    if not unpacked(takes.inputs) and options == PadOptions():
        return Found(None, takes.inputs)
    with contextlib.closing(Child(file)) as child:
        return find_padding(takes.inputs, options, known, child.run, takes.min_history or 0, last)


def find_padding(
    inputs: Sequence[TensorSpec],
    options: PadOptions,
    known: Mapping[str, int],
    run: Run,
    least: int = 0,
    last: Collection[tuple[str, int]] = (),
) -> Found:
    """The histories of a model that are not packed, and how each is padded.

    Args:
        inputs: of the request graph.
        options: what is known.
        known: the id that means no event, of inputs whose graph tells (`analysis.marks`).
        run: computes the request graph's outputs; text says why it cannot.
        least: events of the shortest history that the model takes.
        last: inputs and their axes of which the graph reads the last place (`analysis.last_place`).

    Raises:
        SplitError: when `options` speak of a history or an input that the model does not have, or contradict it.
    """
    groups = unpacked(inputs)
    names = [e.name for events in groups for e in events]
    if unknown := options.values.keys() - {"", *names}:
        raise SplitError(f"--pad-value {min(unknown)}: is no input with a history; there are {', '.join(names)}")
    shapes = {s.name: s.shape for s in inputs}
    fixed = [events for events in groups if isinstance(shapes[events[0].name][events[0].axis], int)]
    if not fixed and (options.side or options.values):
        raise SplitError("--pad, --pad-value: the model has no history of a fixed length to pad")
    found: list[Padding] = []
    told: list[str] = []
    needs: list[str] = []
    specs = {s.name: s for s in inputs}
    for events in groups:
        asked = _Asked(run, inputs, events, options, known, least)
        history = asked.padding(last)
        found.append(history)
        made = history.lengths or any(e.event is not None for e in history.inputs)
        told += [_said(history, asked)] if events in fixed or made else []
        if least == 0 and asked.scores_none_otherwise(history):
            places = ", ".join(f"{e.value} in {e.name}" for e in history.inputs)
            needs.append(
                f"{asked.names()}: at least 1 event, as the graph scores none otherwise than padding alone; for a user "
                f"without any, send one of padding ({places})"
            )
        if history.lengths:
            specs[history.lengths] = asked.length_spec(history.lengths)
    return Found(tuple(found) or None, tuple(specs.values()), tuple(told), tuple(needs))


class _Asked:
    """One history, and requests that differ in it."""

    def __init__(
        self,
        run: Run,
        inputs: Sequence[TensorSpec],
        events: tuple[EventInput, ...],
        options: PadOptions,
        known: Mapping[str, int],
        least: int,
    ) -> None:
        self.run, self.options, self.marks = run, options, known
        self.inputs = {s.name: s for s in inputs}
        common = options.values.get("", 0)
        self.events = tuple(
            dataclasses.replace(e, value=options.values.get(e.name, known.get(e.name, common))) for e in events
        )
        count = max(_EVENTS, 2 * least)
        first, second = (self._random(count, np.random.default_rng(i)) for i in (0, 1))
        self.size = first[events[0].name].shape[events[0].axis]
        self.free = isinstance(self.inputs[events[0].name].shape[events[0].axis], str)
        self.first = self._real(first)
        # Seconds and counts of like size may fall into one bucket: others are all small, or all large.
        spans = [self._real(self._spanned(second, value)) for value in (1, probe.UNBOUNDED - 1)]
        self.seconds = [self._real(second), *(s for s in spans if any(s[e.name] is not second[e.name] for e in events))]
        self.kept = sorted({1, self.size // 2, self.size - 1} - {0, self.size})
        self.shown = ""
        self.marked = False

    def padding(self, last: Collection[tuple[str, int]]) -> Padding:
        """How this history is padded, as far as it is shown or said."""
        found = self._by_lengths() or self._by_mask() or self._by_value()
        self.marked = found is not None
        if found is not None and found.side is not None:
            alike = "the model was seen to score alike with it on the left"  # and not with more or less of it
            self.shown = "the model was seen to ignore what is there" if found.lengths else alike
        elif found is not None and not self.free and self.options.side is None:
            found = self._by_place(found, last)
        other = self.options.side and found is not None and found.side not in (None, self.options.side)
        if found is not None and other and not self._either_side(found):
            raise SplitError(
                f"--pad {self.options.side}: the model ignores {self.names()} where padding on the {found.side} "
                "would be, and not there; leave --pad out"
            )
        side = self.options.side or (found.side if found else None)
        return dataclasses.replace(found or Padding(self.events), side=None if self.free else side)

    def _by_lengths(self) -> Padding | None:
        """Padding that a length tells from events."""
        for spec in self.inputs.values():
            one = spec.scope == "user" and all(n == 1 or isinstance(n, str) for n in spec.shape)
            if not one or np.dtype(spec.dtype).kind not in "iu" or spec.name in {e.name for e in self.events}:
                continue
            for side in _SIDES:
                if self._ignored([(self._with_length(spec.name, k), self._beyond(side, k)) for k in self.kept]):
                    return Padding(self.events, side, spec.name)
        return None

    def length_spec(self, name: str) -> TensorSpec:
        """The input with the lengths that there are: none of 0 where the model fails on it."""
        spec, events = self.inputs[name], self.events[0]
        size = self.inputs[events.name].shape[events.axis]
        low = spec.low or (1 if self._scores(self._with_length(name, 0)) is None else None)
        if isinstance(size, str):
            return dataclasses.replace(spec, low=low or 0, length_of=size)
        return dataclasses.replace(spec, low=low, limit=min(spec.limit or size + 1, size + 1))

    def _by_mask(self) -> Padding | None:
        """Padding that a mask tells from events."""
        for mask in self.events:
            spec = self.inputs[mask.name]
            if len(spec.shape) != mask.axis + 1 or not (spec.dtype == "bool" or spec.limit in (None, 2)):
                continue
            for event, none in ((1, 0), (0, 1)):
                made = dataclasses.replace(mask, value=none, event=event)
                others = tuple(e for e in self.events if e is not mask)
                if others and self._ignored(self._all_masked(made), others):
                    found = Padding(tuple(made if e is mask else e for e in self.events))
                    return dataclasses.replace(found, side="right" if self._either_side(found) else None)
        return None

    def _by_value(self) -> Padding | None:
        """Padding that an id tells from events: others are ignored beside it, or the graph tells that it is none."""
        for ids in self.events:
            if np.dtype(self.inputs[ids.name].dtype).kind not in "iu":
                continue
            if ids.name in self.marks and ids.value != self.marks[ids.name]:
                raise SplitError(
                    f"--pad-value {ids.value}: the model takes {ids.name} of {self.marks[ids.name]} for none"
                )
            others = tuple(e for e in self.events if e is not ids)
            hidden = others and self._ignored(self._all_masked(dataclasses.replace(ids, event=None)), others)
            if hidden or (ids.name in self.marks and not others):
                found = Padding(self.events)
                return dataclasses.replace(found, side="right" if self._either_side(found) else None)
        return None

    def _by_place(self, history: Padding, last: Collection[tuple[str, int]]) -> Padding:
        """Padding of a model that knows places: where events still count, and before a last place that is read."""
        counting = [side for side in _SIDES if all(self._counts(history, side, k) for k in self.kept)]
        if len(counting) == 1:
            self.shown = f"on the {_OTHER[counting[0]]} the model would not look at all events"
            return dataclasses.replace(history, side=counting[0])
        if any((e.name, e.axis) in last for e in self.events):
            self.shown = "the model reads the last place, whatever it holds"
            return dataclasses.replace(history, side="left")
        return history

    def _counts(self, history: Padding, side: Side, count: int) -> bool:
        """Whether scores change with the events of a history of so many, padded on this side."""
        one, *others = (self._scores(self._padded(history, side, count, r)) for r in (self.first, *self.seconds))
        return one is not None and any(other is not None and not _same(one, other) for other in others)

    def _either_side(self, history: Padding) -> bool:
        """Whether scores are the same with padding on the left and on the right."""
        if history.lengths or not self.kept:
            return False
        for k in self.kept:
            left, right = (self._scores(self._padded(history, side, k)) for side in _SIDES)
            if left is None or right is None or not _same(left, right):
                return False
        return True

    def scores_none_otherwise(self, history: Padding) -> bool:
        """Whether a history of a free length that may have padding has another score without places than of padding."""
        if not self.free or history.lengths or not self._drops_padding(history):
            return False
        none, padding = (self._scores(self._first_places(self._padded(history, "right", 0), n)) for n in (0, 1))
        return none is not None and padding is not None and not _same(none, padding)

    def _drops_padding(self, history: Padding) -> bool:
        """Whether events have the same scores with padding on either side as without."""
        for k in self.kept:
            alone = self._scores(self._first_places(self.first, k))
            for side in _SIDES:
                padded = self._scores(self._padded(history, side, k))
                if alone is None or padded is None or not _same(alone, padded):
                    return False
        return bool(self.kept)

    def _first_places(self, request: Mapping[str, Array], count: int) -> dict[str, Array]:
        """A request with the first `count` places of this history."""
        places = {e.name: request[e.name][(*self._all(e), slice(0, count))] for e in self.events}
        return {**request, **places}

    def _padded(
        self, history: Padding, side: Side, count: int, request: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """The first `count` events of a request, the first one's where none is given, and padding."""
        events_of = self.first if request is None else request
        made = dict(self.first)
        for e in history.inputs:
            places = np.full_like(made[e.name], e.value)
            here = (*self._all(e), self._beyond(_OTHER[side], self.size - count))
            events = events_of[e.name][(*self._all(e), slice(0, count))]
            places[here] = events if e.event is None else e.event
            made[e.name] = places
        return made

    def _random(self, count: int, rng: np.random.Generator) -> dict[str, Array]:
        """A request whose integers without a limit fall into many buckets."""
        inputs = list(self.inputs.values())
        return probe.wide(inputs, probe.single(inputs, count, _TARGETS, rng), rng)

    def _with_length(self, name: str, count: int) -> dict[str, Array]:
        return {**self.first, name: np.full_like(self.first[name], count)}

    def _masked(self, mask: EventInput, side: Side, count: int) -> dict[str, Array]:
        """The first request with `count` events, and what says that there are no others; those stay beneath it."""
        made = self.first[mask.name].copy() if mask.event is None else np.full_like(self.first[mask.name], mask.event)
        made[(*self._all(mask), self._beyond(side, count))] = mask.value
        return {**self.first, mask.name: made}

    def _all_masked(self, mask: EventInput) -> list[tuple[dict[str, Array], slice]]:
        """Requests of each number of events on each side, and the places without one."""
        return [(self._masked(mask, side, k), self._beyond(side, k)) for k in self.kept for side in _SIDES]

    def _ignored(
        self, cases: Sequence[tuple[Mapping[str, Array], slice]], changed: tuple[EventInput, ...] | None = None
    ) -> bool:
        """Whether `changed` count at none of the places, of requests in one of which they count elsewhere.

        In one, not in each: the weight of a single event is 1, whatever it is.
        """
        counts = False
        for request, places in cases:
            elsewhere = slice(0, places.start) if places.start else slice(places.stop, None)
            before = self._scores(request)
            for second in self.seconds:
                after = self._scores(self._with(second, request, places, changed))
                if before is None or after is None or not _same(before, after):
                    return False
                other = None if counts else self._scores(self._with(second, request, elsewhere, changed))
                counts = counts or (other is not None and not _same(before, other))
        return counts

    def _with(
        self,
        second: Mapping[str, Array],
        request: Mapping[str, Array],
        at: slice,
        changed: tuple[EventInput, ...] | None,
    ) -> dict[str, Array]:
        """`request` with other events at some places."""
        made = dict(request)
        for e in self.events if changed is None else changed:
            made[e.name] = made[e.name].copy()
            made[e.name][(*self._all(e), at)] = second[e.name][(*self._all(e), at)]
        return made

    def _beyond(self, side: Side, count: int) -> slice:
        """Places without an event, of a history of `count` events padded on this side."""
        return slice(count, self.size) if side == "right" else slice(0, self.size - count)

    def _scores(self, request: Mapping[str, Array]) -> Array | None:
        out = self.run(probe.pack(list(self.inputs.values()), [dict(request)]))
        return None if isinstance(out, str) else np.concatenate([np.ravel(x).astype(np.float64) for x in out])

    def _spanned(self, request: Mapping[str, Array], value: int) -> dict[str, Array]:
        """A request with this value in place of integers of the history that have no limit."""
        free = (e.name for e in self.events if np.dtype(self.inputs[e.name].dtype).kind in "iu")
        whole = {n: np.iinfo(request[n].dtype).max for n in free if self.inputs[n].limit is None}
        return {**request, **{n: np.full_like(request[n], min(value, most)) for n, most in whole.items()}}

    def _real(self, request: dict[str, Array]) -> dict[str, Array]:
        """A request without the ids that stand for no event."""
        for e in self.events:
            spec = self.inputs[e.name]
            if np.dtype(spec.dtype).kind in "iu" and spec.limit not in (1, 2):
                other = e.value + 1 if spec.limit is None or e.value + 1 < spec.limit else e.value - 1
                request[e.name] = np.where(request[e.name] == e.value, other, request[e.name]).astype(spec.dtype)
        return request

    def names(self) -> str:
        return ", ".join(e.name for e in self.events)

    @staticmethod
    def _all(event: EventInput) -> tuple[slice, ...]:
        return (slice(None),) * event.axis


_SIDES: Final[tuple[Side, Side]] = ("right", "left")
_OTHER: Final[Mapping[Side, Side]] = {"right": "left", "left": "right"}


def _same(a: Array, b: Array) -> bool:
    scale = float(max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0)))
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=_ROUNDING * scale)


def _said(history: Padding, asked: _Asked) -> str:
    names = ", ".join(e.name for e in history.inputs)
    filled = [n for n in (history.lengths, *(e.name for e in history.inputs if e.event is not None)) if n]
    made = f"; {', '.join(filled)} need not be sent: then send real events only, as each counts" if filled else ""
    if weights := [n for n in filled if np.dtype(asked.inputs[n].dtype).kind == "f"]:  # which no question tells apart
        made += f"; but send {', '.join(weights)} if it is a weight, and no mask of 0 and 1"
    if asked.free:
        return f"{names}: of any length{made}"
    if history.side is None:
        why = "nothing shows how fewer are padded"
        if asked.marked:
            why = "the model tells padding from events, but scores it otherwise on the left than on the right"
        return (
            f"{names}: exactly {asked.size} events, as {why}{made}; pass --pad left or --pad right, as the model was "
            "trained, to serve shorter histories"
        )
    values = ", ".join(dict.fromkeys(str(e.value) for e in history.inputs))
    if "," in values:
        values = ", ".join(f"{e.value} in {e.name}" for e in history.inputs)
    how = asked.shown or "as you say; nothing shows it"
    return f"{names}: fewer than {asked.size} events are padded on the {history.side} with {values} ({how}){made}"
