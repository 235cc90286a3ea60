"""A lifted bundle against its own pointwise graph or module, which knows one target with one user at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np

from stca import probe
from stca.arrays import Array
from stca.errors import ParityError
from stca.manifest import Manifest
from stca.specs import POINTWISE, TARGETS, TensorSpec

Make: TypeAlias = Callable[[Manifest, Mapping[str, Array], Array], dict[str, Array]]
Run: TypeAlias = Callable[[Sequence[Mapping[str, Array]]], list[Array]]

# Targets of a request that are scored alone, and history tokens times targets that are computed at once in float64.
ALONE: Final = 9
AT_ONCE: Final = 20_000
# As many are asked of a module that needs a copy of the user for each target: recurrent layers take minutes for more.
MOST: Final = 30_000


def pointwise_feeds(manifest: Manifest, feeds: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Inputs of a bundle's pointwise graph for these targets of a request: each with a copy of its user.

    Args:
        feeds: of the request graph.
        rows: numbers of the targets.
    """
    request = {s.name: s for s in manifest.graphs["request"].inputs}
    made = dict(feeds)
    for spec in manifest.graphs[POINTWISE].inputs:
        for axis, (mine, theirs) in enumerate(zip(request[spec.name].shape, spec.shape, strict=True)):
            if mine == theirs:
                continue
            x = feeds[spec.name]
            made[spec.name] = x.take(rows, axis) if mine == TARGETS else x.repeat(len(rows), axis)
    return made


def with_fewer_copies(inputs: Sequence[TensorSpec], tokens: int, targets: int) -> list[tuple[int, int]]:
    """A request's history tokens and targets, or two requests: as long a one, and one with as many targets.

    Args:
        inputs: of the request graph.
        tokens, targets: of the request.
    """
    fewer = max(1, MOST // max(1, targets))
    if tokens * targets <= MOST or probe.history_of(inputs, fewer) != fewer:  # of a fixed length
        return [(tokens, targets)]
    return [(tokens, max(1, MOST // tokens)), (fewer, targets)]


def some_targets(manifest: Manifest, feeds: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    """Inputs of the request graph for some targets of a request."""
    axes = {s.name: s.shape.index(TARGETS) for s in manifest.graphs["request"].inputs if TARGETS in s.shape}
    return {n: x.take(rows, axes[n]) if n in axes else x for n, x in feeds.items()}


def targets_of(manifest: Manifest, feeds: Mapping[str, Array]) -> int:
    """How many targets a request has."""
    spec = next(s for s in manifest.graphs["request"].inputs if TARGETS in s.shape)
    return int(feeds[spec.name].shape[spec.shape.index(TARGETS)])


def in_pieces(manifest: Manifest, feeds: Sequence[Mapping[str, Array]], make: Make, run: Run) -> list[Array]:
    """Scores of all targets of each request, computed some at a time.

    Args:
        feeds: of the request graph, for each request.
        make: inputs for some of a request's targets, `pointwise_feeds` or `some_targets`.
        run: scores of each of several inputs.
    """
    pieces: list[list[dict[str, Array]]] = []
    for given in feeds:
        targets, step = targets_of(manifest, given), max(1, AT_ONCE // _tokens(given))
        rows = [np.arange(i, min(i + step, targets)) for i in range(0, max(targets, 1), step)]
        pieces.append([make(manifest, given, some) for some in rows])
    scores = iter(run([piece for several in pieces for piece in several]))
    return [np.concatenate([next(scores) for _ in several]) for several in pieces]


def _tokens(feeds: Mapping[str, Array]) -> int:
    """The largest size of an input but its first: about what one row costs."""
    return max((n for x in feeds.values() for n in x.shape[1:]), default=1) or 1


def require_alone(
    manifest: Manifest, feeds: Sequence[Mapping[str, Array]], reference: Sequence[Array], run: Run
) -> None:
    """Raise ParityError where a target has another score than alone with its user, beyond float64's rounding.

    Args:
        feeds: of the request graph, for each request.
        reference: scores of each request's targets.
        run: scores of each of several pointwise inputs, in float64.
    """
    for given, scores in zip(feeds, reference, strict=True):
        targets = targets_of(manifest, given)
        rows = np.unique(np.linspace(0, targets - 1, min(targets, ALONE)).round().astype(int))
        alone = np.concatenate(run([pointwise_feeds(manifest, given, np.array([i])) for i in rows]))
        scale = float(np.abs(alone[np.isfinite(alone)]).max(initial=0.0))
        if not np.allclose(alone, scores[rows], rtol=0, atol=1e-6 * scale, equal_nan=True):
            raise ParityError(
                f"a target's score is another among {targets} targets than alone with its user, in float64 too; let no "
                "row of a batch see another (batch statistics, a mean over the batch), or export with --no-lift"
            )
