"""Histories of models that take them padded: requests bring events, and the model gets as many places as it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stca.arrays import Array
from stca.errors import RequestError
from stca.specs import EventInput, Padding, TensorSpec


class History:
    """One history of a model, as its manifest declares it.

    Args:
        padding: of the manifest.
        inputs: of the request graph, by name.
        min_history: least events that are served; None for none.
        max_history: most events that are served; None for as many as the model takes.
        truncate: keep the most recent events of a longer history instead of refusing it.
    """

    def __init__(
        self,
        padding: Padding,
        inputs: Mapping[str, TensorSpec],
        min_history: int | None,
        max_history: int | None,
        truncate: bool,
    ) -> None:
        self._padding, self._truncate = padding, truncate
        self._specs = {e.name: inputs[e.name] for e in padding.inputs}
        self._lengths = inputs[padding.lengths] if padding.lengths else None
        first = padding.inputs[0]
        size = inputs[first.name].shape[first.axis]
        self.size = size if isinstance(size, int) else None
        self._least = max(min_history or 0, (self._lengths.low or 0) if self._lengths else 0)
        limits = [n for n in (self.size, max_history) if n is not None]
        self._limit = min(limits, default=None)

    @property
    def names(self) -> tuple[str, ...]:
        """Inputs that this history fills in or pads."""
        return (*self._specs, *([self._lengths.name] if self._lengths else []))

    def complete(self, sent: Mapping[str, Array]) -> dict[str, Array]:
        """This history's inputs as the model takes them.

        Args:
            sent: those of its inputs that a request brings, as arrays of any length, with or without the axis of 1.

        Raises:
            RequestError: naming the input, its events and the limit.
        """
        events: dict[str, Array] = {}
        for event in self._padding.inputs:
            if event.name in sent:
                events[event.name] = _with_all_axes(self._specs[event.name], event, sent[event.name])
            elif event.event is None:
                return dict(sent)  # whoever looks for it says that it is missing
        count = self._count(events)
        kept = self._kept(count, next(iter(events)))
        full = self._full(events, sent, count)
        made: dict[str, Array] = {}
        for event in self._padding.inputs:
            recent = events[event.name] if event.name in events else self._mask(event, count)
            if kept < count:
                recent = recent.take(np.arange(count - kept, count), axis=event.axis)
            made[event.name] = self._padded(event, recent, kept)
        if self._lengths:
            made[self._lengths.name] = self._length(sent.get(self._lengths.name), kept, count, full)
        return made

    def _count(self, events: Mapping[str, Array]) -> int:
        counts = {e.name: events[e.name].shape[e.axis] for e in self._padding.inputs if e.name in events}
        first = next(iter(counts))
        for name, n in counts.items():
            if n != counts[first]:
                raise RequestError(f"{name}: has {n} events, {first} has {counts[first]}; send all of each event")
        return int(counts[first])

    def _kept(self, count: int, name: str) -> int:
        """How many of so many events are served."""
        if count < self._least:
            raise RequestError(f"{name}: has {count} events, the model needs at least {self._least}")
        if self._limit is not None and count > self._limit:
            if not self._truncate:
                raise RequestError(
                    f"{name}: has {count} events, the limit is {self._limit}; send the most recent ones, or load the "
                    "session with truncate=True"
                )
            count = self._limit
        if self.size is not None and self._padding.side is None and count != self.size:
            raise RequestError(
                f"{name}: has {count} events, the model takes exactly {self.size}; export it with --pad left or --pad "
                "right to serve shorter histories"
            )
        return count

    def _full(self, events: Mapping[str, Array], sent: Mapping[str, Array], count: int) -> bool:
        """Whether the history comes padded by whoever sends it: then its lengths are theirs to say.

        Raises:
            RequestError: when they leave the lengths out although there seems to be padding.
        """
        if self._lengths is None or self.size not in (None, count) or count < 1:
            return False
        if self._lengths.name not in sent and self._padding.side is not None:
            at = 0 if self._padding.side == "left" else count - 1
            ids = [e for e in self._padding.inputs if e.name in events and events[e.name].dtype.kind in "iu"]
            if ids and all((events[e.name].take(at, e.axis) == e.value).all() for e in ids):
                raise RequestError(
                    f"{self._lengths.name}: is missing, and {ids[0].name} comes with padding; send both, or the events "
                    "alone"
                )
        return True

    def _mask(self, event: EventInput, count: int) -> Array:
        spec = self._specs[event.name]
        shape = [n if isinstance(n, int) else 1 for n in spec.shape]
        shape[event.axis] = count
        return np.full(shape, event.event, spec.dtype)

    def _padded(self, event: EventInput, recent: Array, count: int) -> Array:
        if self.size is None or self.size == count:
            return recent
        shape = list(recent.shape)
        shape[event.axis] = self.size
        places = np.full(shape, event.value, recent.dtype)
        begin = self.size - count if self._padding.side == "left" else 0
        places[(slice(None),) * event.axis + (slice(begin, begin + count),)] = recent
        return places

    def _length(self, sent: Array | None, kept: int, count: int, full: bool) -> Array:
        """The lengths input: made of the events, or as sent when it tells of as many."""
        assert self._lengths is not None
        shape = [n if isinstance(n, int) else 1 for n in self._lengths.shape]
        if sent is None:
            return np.full(shape, kept, self._lengths.dtype)
        if sent.size != 1 or sent.dtype.kind not in "iu":
            return sent  # refused for its shape or dtype, like any other input
        said = int(sent.reshape(()))
        if full and said <= count == kept:
            return sent.reshape(shape)
        if said != count:
            raise RequestError(f"{self._lengths.name}: says {said}, but the request has {count} events; leave it out")
        return np.full(shape, kept, self._lengths.dtype)


def _with_all_axes(spec: TensorSpec, event: EventInput, raw: Array) -> Array:
    """The events with the axis of 1 before them, where the model has one and the request leaves it out.

    Raises:
        RequestError: naming the shape that was expected.
    """
    rank, sent = len(spec.shape), raw.shape
    if raw.size == 0 and raw.ndim < rank:  # an empty list does not say what its entries would be
        shape = [n if isinstance(n, int) else 1 for n in spec.shape]
        shape[event.axis] = 0
        return np.zeros(shape, raw.dtype if raw.dtype != np.float64 else spec.dtype)
    if event.axis == 1 and raw.ndim == rank - 1:
        raw = raw[np.newaxis]
    fits = raw.ndim == rank and (event.axis == 0 or len(raw) == 1)
    behind = zip(spec.shape[event.axis + 1 :], raw.shape[event.axis + 1 :], strict=False)
    if not fits or any(isinstance(n, int) and n != has for n, has in behind):
        raise RequestError(f"{spec.name}: has shape {list(sent)}, expected {_events_shape(spec, event)}")
    return raw


def _events_shape(spec: TensorSpec, event: EventInput) -> str:
    shape: list[Any] = [*spec.shape]
    shape[event.axis] = "events"
    return "[" + ", ".join(map(str, shape[event.axis :])) + "]"
