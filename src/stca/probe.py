"""Random valid inputs made from a model's own input specs, for checks and measurements on any bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stca.bundle import OFFSETS, TARGETS, TOKENS, USERS, TensorSpec
from stca.types import Array

# What an integer without an id limit may be: seconds, counts. Up to 97 days covers every duration bucket.
_UNBOUNDED = 1 << 23


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
    """
    known = {**row_sizes(inputs, tokens, targets), **sizes}
    made: dict[str, Array] = {}
    for spec in inputs:
        if spec.shape == (OFFSETS,):
            continue
        shape = tuple(n if isinstance(n, int) else known.get(n, 1) for n in spec.shape)
        if spec.dtype.startswith("float"):
            made[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.scope == "target" and spec.limit and shape == (targets,) and targets <= spec.limit:
            made[spec.name] = rng.choice(spec.limit, targets, replace=False).astype(spec.dtype)
        else:
            made[spec.name] = rng.integers(0, spec.limit or (2 if spec.dtype == "bool" else _UNBOUNDED), shape).astype(
                spec.dtype
            )
    return made


def row_sizes(inputs: Sequence[TensorSpec], tokens: int, targets: int) -> dict[str, int]:
    """Size of each symbolic dimension for one request, whatever a model calls its dimensions.

    The last symbolic dimension of a user input counts tokens, that of a target input targets, unless inputs of other
    scopes have it too: such a one, and every other, is a batch axis and 1.
    """
    scopes: dict[str, set[str | None]] = {}
    last: set[str] = set()
    for spec in inputs:
        names = [n for n in spec.shape if isinstance(n, str)]
        for n in names:
            scopes.setdefault(n, set()).add(spec.scope)
        last.update([n for n in names if n in (TOKENS, TARGETS)] or names[-1:])
    rows: dict[str | None, int] = {"user": tokens, "target": targets}
    sizes = {n: rows.get(next(iter(s)), 1) if len(s) == 1 and n in last else 1 for n, s in scopes.items()}
    return sizes | {USERS: 1, OFFSETS: 2}


def pack(inputs: Sequence[TensorSpec], requests: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Feeds of the request graph for several requests of `single`, joined with offsets where the model has them."""
    feeds: dict[str, Array] = {}
    for spec in inputs:
        if spec.shape == (OFFSETS,):
            rows = next(s.name for s in inputs if s.scope == spec.scope and s.shape[:1] != (OFFSETS,) and _ragged(s))
            feeds[spec.name] = np.cumsum([0, *(len(r[rows]) for r in requests)]).astype(spec.dtype)
        elif len(requests) == 1:
            feeds[spec.name] = requests[0][spec.name]
        else:
            feeds[spec.name] = np.concatenate([r[spec.name] for r in requests])
    return feeds


def _ragged(spec: TensorSpec) -> bool:
    return spec.shape[:1] in ((TOKENS,), (TARGETS,))
