"""Random valid inputs made from a model's own input specs, for checks and measurements on any bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stca.arrays import Array
from stca.specs import OFFSETS, TARGETS, TOKENS, USERS, GraphSpec, TensorSpec

# What integers without an id limit are drawn below: an hour, an age, a count. And what `wide` ones are, seconds too: up
# to 97 days covers every duration bucket.
MODEST, UNBOUNDED = 1000, 1 << 23


def single(
    inputs: Sequence[TensorSpec], tokens: int, targets: int, rng: np.random.Generator, **sizes: int
) -> dict[str, Array]:
    """Inputs of one request, offsets left out as `Request` wants them.

    Targets differ from one another where the id limit allows it: equal targets tie, and ties have no top k.

    Args:
        inputs: specs of the request graph's inputs.
        tokens, targets: rows of the symbolic sizes `N_h` and `N_t`.
        rng: source of the values.
        sizes: of other symbolic dimensions; 1 where not given.

    A batch axis that users and targets share has `targets` rows, each with a copy of the one user.
    """
    known = {**row_sizes(inputs, tokens, targets), **sizes}
    copied = shared_rows(inputs) - sizes.keys()
    made: dict[str, Array] = {}
    for spec in inputs:
        if spec.is_offsets:
            continue
        copies = [axis for axis, n in enumerate(spec.shape) if n in copied and spec.scope != "target"]
        shape = tuple(
            1 if i in copies else n if isinstance(n, int) else known.get(n, 1) for i, n in enumerate(spec.shape)
        )
        made[spec.name] = _with_an_event(spec, _draw(spec, shape, known, rng).astype(spec.dtype))
        for axis in copies:
            made[spec.name] = made[spec.name].repeat(targets, axis)
    return made


def padded(inputs: Sequence[TensorSpec], request: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """A request of `single` in which about half of a user's integers are the least there is: no event, no value.

    Drawn from all ids, that one is met too seldom to show what a model makes of it. The first of each input stays.
    """
    made = dict(request)
    for spec in inputs:
        if spec.scope == "user" and np.dtype(spec.dtype).kind in "iu" and spec.length_of is None and spec.name in made:
            least = rng.random(made[spec.name].shape) < 0.5
            least.flat[:1] = False
            gaps = np.where(least, max(spec.low or 0, 0), made[spec.name]).astype(spec.dtype)
            made[spec.name] = _with_an_event(spec, gaps)
    return made


def unlimited(inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Inputs of integers of which nothing says where they end."""
    kinds = [s for s in inputs if np.dtype(s.dtype).kind in "iu" and not s.is_offsets]
    return [s for s in kinds if s.limit is None and s.length_of is None and _end(s, UNBOUNDED) > MODEST]


def wide(inputs: Sequence[TensorSpec], request: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """A request of `single` in which integers without a limit are large as well, as seconds are."""
    made = dict(request)
    for spec in unlimited(inputs):
        if spec.name in made:
            values = rng.integers(max(spec.low or 0, 0), _end(spec, UNBOUNDED), made[spec.name].shape)
            made[spec.name] = values.astype(spec.dtype)
    return made


def _end(spec: TensorSpec, end: int) -> int:
    """What integers of an input without a limit stay below, of those below `end`."""
    return max(min(end, int(np.iinfo(spec.dtype).max) + 1), (spec.low or 0) + 1)


def _with_an_event(spec: TensorSpec, values: Array) -> Array:
    """The values, the first place changed where all hold what stands for no event and the model has no score for it."""
    if spec.blank is not None and values.size and (values == spec.blank).all():
        lower = spec.blank > max(spec.low or 0, 0)
        values.flat[0] = spec.blank - 1 if lower else spec.blank + 1
    return values


def _draw(spec: TensorSpec, shape: tuple[int, ...], sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    """Values that a model accepts for an input; ids of targets differ where there are enough of them."""
    if spec.dtype.startswith("float") and spec.limit is None:
        normal = rng.standard_normal(shape)
        return normal if spec.low is None else spec.low + np.abs(normal)
    # What a model makes of ids far below zero is its guard's business: one of them is as good as another.
    # Of counts without a limit, 0 may be none, of which `padded` makes gaps.
    counts = spec.dtype != "bool" and (spec.limit, spec.low, spec.length_of) == (None,) * 3
    low, end = (
        1 if counts else max(spec.low or 0, -1),
        spec.limit or (2 if spec.dtype == "bool" else _end(spec, MODEST)),
    )
    if spec.length_of is not None:
        end = min(end, sizes.get(spec.length_of, 1) + 1)
    if spec.scope == "target" and spec.limit and len(shape) == 1 and shape[0] <= end - low:
        return low + rng.choice(end - low, shape[0], replace=False)
    return rng.integers(min(low, end - 1), end, shape)


def shared_rows(inputs: Sequence[TensorSpec]) -> set[str]:
    """The batch axis of a pointwise graph: symbolic sizes that inputs of targets and of others have.

    Where every target input has a size of targets alone besides, as `cand` of `[batch, cand]`, the batch is one of
    requests, and there is no such axis.
    """
    of_targets, of_others = (
        [{n for n in s.shape if isinstance(n, str)} for s in inputs if (s.scope == "target") is of]
        for of in (True, False)
    )
    others = set[str]().union(*of_others)
    of_targets = [names for names in of_targets if names != {OFFSETS}]
    if not of_targets or set[str].intersection(*of_targets) - others:
        return set()
    return set[str]().union(*of_targets) & others - {OFFSETS}


def row_sizes(inputs: Sequence[TensorSpec], tokens: int, targets: int) -> dict[str, int]:
    """Size of each symbolic dimension for one request, whatever a model calls its dimensions.

    The last symbolic dimension of a user input counts tokens, that of a target input targets. A batch axis of users and
    targets counts targets, each with a copy of its user (`single` makes them); every other is one of requests and 1.
    """
    shared = shared_rows(inputs)
    scopes: dict[str, set[str | None]] = {}
    last: set[str] = set()
    for spec in inputs:
        names = [n for n in spec.shape if isinstance(n, str)]
        for n in names:
            scopes.setdefault(n, set()).add(spec.scope)
        last.update([n for n in names if n in (TOKENS, TARGETS)] or names[-1:])
    rows: dict[str | None, int] = {"user": tokens, "target": targets}
    sizes = {n: rows.get(next(iter(s)), 1) if len(s) == 1 and n in last else 1 for n, s in scopes.items()}
    return sizes | {USERS: 1, OFFSETS: 2} | dict.fromkeys(shared, targets)


def history_of(inputs: Sequence[TensorSpec], tokens: int) -> int:
    """How long a history `single` really makes for `tokens`: a model of a fixed length takes that one alone.

    0 where the model has no history.
    """
    user = [s for s in inputs if s.scope == "user" and not s.is_offsets]
    if any(n == -1 for n in row_sizes(user, -1, 1).values()):
        return tokens
    return max((n for n in events_by_size(inputs) if isinstance(n, int)), default=0)


def targets_of(graph: GraphSpec, targets: int) -> int:
    """How many targets a request graph really scores for `targets`: one of a fixed number scores that one alone."""
    rows = row_sizes(graph.inputs, 1, -1)
    if any(rows.get(str(n)) == -1 for s in graph.inputs if s.scope == "target" for n in s.shape):
        return targets
    fixed = graph.outputs[0].shape[:1]
    return next((n for n in fixed if isinstance(n, int)), 1)


def events_by_size(inputs: Sequence[TensorSpec]) -> dict[int | str, list[tuple[str, int]]]:
    """User inputs with an entry for each event of a history that is not packed, and the axis of those, by their number.

    The entries lie along the axis after that of the batch, which is 1 or counts requests, or along the first where
    there is no batch. Floats of a fixed size are a vector of the user's, unless integers have that size too.
    """
    counts = {n for n, size in row_sizes(inputs, 2, 3).items() if size == 2}
    by_size: dict[int | str, list[tuple[str, int]]] = {}
    whole: set[int | str] = set()
    for spec in inputs:
        axis = 1 if len(spec.shape) > 1 and (spec.shape[0] == 1 or isinstance(spec.shape[0], str)) else 0
        if spec.scope != "user" or len(spec.shape) <= axis or spec.shape[:1] == (TOKENS,):
            continue
        size = spec.shape[axis]
        if size in counts or (isinstance(size, int) and size > 1):
            by_size.setdefault(size, []).append((spec.name, axis))
            if np.dtype(spec.dtype).kind in "iu" or len(spec.shape) > axis + 1 or isinstance(size, str):
                whole.add(size)
    return {size: events for size, events in by_size.items() if size in whole}


def pack(inputs: Sequence[TensorSpec], requests: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Feeds of the request graph for several requests of `single`, joined with offsets where the model has them."""
    feeds: dict[str, Array] = {}
    for spec in inputs:
        if spec.is_offsets:
            counted = TOKENS if spec.scope == "user" else TARGETS  # as a session's door counts them
            rows = next((s.name for s in inputs if s.shape[:1] == (counted,)), None)
            counts = [len(r[rows]) if rows else 0 for r in requests]
            feeds[spec.name] = np.cumsum([0, *counts]).astype(spec.dtype)
        elif len(requests) == 1:
            feeds[spec.name] = requests[0][spec.name]
        else:
            feeds[spec.name] = np.concatenate([r[spec.name] for r in requests])
    return feeds
