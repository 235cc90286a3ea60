"""Which inputs of a request graph hold the events of a history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stca import probe
from stca.manifest import TOKENS, EventInput, TensorSpec, packable


def unpacked(inputs: Sequence[TensorSpec]) -> list[tuple[EventInput, ...]]:
    """Inputs with an entry for each event of a history, those of one size together; none where histories are packed.

    The entries lie along the axis after that of the batch, which is 1 or counts requests, or along the first where
    there is no batch. Floats of a fixed size are a vector of the user's, unless integers have that size too.
    """
    if probe.shared_rows(inputs):
        return []  # a row per target: what is sent is a batch, and no history of one user
    if packable(inputs):
        return []
    counts = {n for n, size in probe.row_sizes(inputs, 2, 3).items() if size == 2}
    by_size: dict[int | str, list[EventInput]] = {}
    whole: set[int | str] = set()
    for spec in inputs:
        axis = 1 if len(spec.shape) > 1 and (spec.shape[0] == 1 or isinstance(spec.shape[0], str)) else 0
        if spec.scope != "user" or len(spec.shape) <= axis or spec.shape[:1] == (TOKENS,):
            continue
        size = spec.shape[axis]
        if size in counts or (isinstance(size, int) and size > 1):
            by_size.setdefault(size, []).append(EventInput(spec.name, axis))
            if np.dtype(spec.dtype).kind in "iu" or len(spec.shape) > axis + 1 or isinstance(size, str):
                whole.add(size)
    return [tuple(events) for size, events in by_size.items() if size in whole]


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
