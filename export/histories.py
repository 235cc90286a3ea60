"""Which inputs of a request graph hold the events of a history."""

from __future__ import annotations

from collections.abc import Sequence

from stca import probe
from stca.specs import TOKENS, EventInput, TensorSpec, packable


def unpacked(inputs: Sequence[TensorSpec]) -> list[tuple[EventInput, ...]]:
    """Inputs with an entry for each event of a history, those of one size together; none where histories are packed.

    `probe.events_by_size` says which.
    """
    if probe.shared_rows(inputs):
        return []  # a row per target: what is sent is a batch, and no history of one user
    if packable(inputs):
        return []
    return [tuple(EventInput(name, axis) for name, axis in events) for events in probe.events_by_size(inputs).values()]


def least_events(inputs: Sequence[TensorSpec]) -> int:
    """1 where a history without events has no score, as `blank` and the least of a length tell; 0 where one may have.

    Of a model with several histories, one may be empty where another is not: then only its inputs tell.
    """
    packed = {s.name for s in inputs if s.scope == "user" and TOKENS in s.shape}
    counts = any(s.length_of == TOKENS and (s.low or 0) > 0 for s in inputs)
    blank = {s.name for s in inputs if s.blank is not None}
    each = [{e.name for e in events} for events in unpacked(inputs)]
    return int(counts or bool(packed & blank) or (bool(each) and all(names & blank for names in each)))


def event_inputs(inputs: Sequence[TensorSpec]) -> frozenset[str]:
    """Inputs with an entry for each event of a history, packed or not."""
    packed = (s.name for s in inputs if s.scope == "user" and TOKENS in s.shape)
    return frozenset((*packed, *(e.name for events in unpacked(inputs) for e in events)))
