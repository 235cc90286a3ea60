"""Lift a graph and prove it, or say what stands in the way.

The proof is that a lifted graph scores each target as the pointwise graph scores it alone with the same user, in
float64. Alone, and not in a batch of copies: where rows see each other (a mean over the batch, batch statistics), a
batch of copies and a lifted graph agree, and both are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from stca import probe
from stca.arrays import Array, Progress
from stca.errors import SplitError, told
from stca.export.analysis.rows import NeverRunsError, attempts, draw
from stca.export.analysis.whose_rows import shares_rows
from stca.export.passes.lift import Lifted, lift
from stca.export.passes.to_double import distance, in_double
from stca.specs import TARGETS, TensorSpec

# Targets and history sizes of each request that is tried, whether half of its events are none, and how many of its
# targets are scored alone at most.
_TRIED: Final = ((1, 9, False), (2, 1, False), (17, 12, False), (5, 11, True), (300, 5, False), (4, 0, False))
_ALONE: Final = 17
_TOLERANCE: Final = 1e-6

_WAY_OUT = "mend the model, or export with --no-lift to serve it as it stands"


def lifted_and_proven(model: onnx.ModelProto, inputs: Sequence[TensorSpec], progress: Progress) -> Lifted | None:
    """`model` at request level, each target's score shown to be the one it has alone with its user.

    Args:
        model: valid, weights inline, functions inlined but the operator's; not changed.
        inputs: of the graph, each with its scope.
        progress: told each step as it starts.

    Returns:
        None where users and targets share no batch axis, and no node repeats users for targets.

    Raises:
        SplitError: naming the node in the way, and why.
    """
    try:
        lifted = lift(model, inputs)
        if lifted is None:
            return None
        progress(f"lifting: one row for the user, a row per target ({lifted.rows} is parted)")
        found = _differs(model, lifted)
    except SplitError as e:
        if not shares_rows(inputs):
            return None  # a request-level model goes on as it is
        raise SplitError(str(e) if isinstance(e, NeverRunsError) else f"{e}; {_WAY_OUT}") from e
    if found is not None:
        if not lifted.shared:
            return None
        if lifted.mixes:
            raise SplitError(
                f"a target's score depends on the other rows of its batch: node {lifted.mixes} ({found}); {_WAY_OUT}"
            )
        raise SplitError(f"scores of the lifted graph are not those of each target alone ({found}); {_WAY_OUT}")
    return lifted


def _differs(pointwise: onnx.ModelProto, lifted: Lifted) -> str | None:
    """Where the two graphs differ, in words; None when they agree.

    Raises:
        SplitError: when the pointwise graph cannot be run with one row.
    """
    inputs, alone = lifted.inputs, lifted.shared  # where the model itself repeated users, it takes all targets at once
    one, all_at_once = in_double(pointwise), in_double(lifted.model)
    free = {n for s in inputs for n in s.shape if isinstance(n, str)} - {TARGETS}
    for targets, history, some_none in _TRIED if free else [t for t in _TRIED if t[1]]:
        places = np.unique(np.linspace(0, targets - 1, min(targets, _ALONE)).round().astype(int))
        wanted, failed = [], None
        for integers, scale in attempts():  # an index or a length of which the graph does not tell the limit, perhaps
            if scale > 1 and history < 2:
                break
            feeds = draw(inputs, {**dict.fromkeys(free, history * scale), TARGETS: targets}, integers)
            feeds = probe.padded(inputs, feeds, np.random.default_rng(0)) if some_none else feeds
            try:
                wanted = [one(_row(inputs, feeds, i)) for i in places] if alone else [one(feeds)]
                break
            except Exception as e:
                failed = failed or e
        if not wanted:
            if history > 1 and not some_none:
                raise SplitError(f"the model does not run with one row: {told(failed)}") from failed
            continue  # it does not take so short a history, or one of padding, lifted or not
        try:
            together = all_at_once(feeds)
        except Exception as e:
            if not history:
                continue  # the encoder is asked later what it makes of no events
            return f"with {targets} targets and one history the lifted graph fails: {told(e)}"
        for out, whole, parts in zip(lifted.model.graph.output, together, zip(*wanted, strict=True), strict=True):
            axis = [d.dim_param for d in out.type.tensor_type.shape.dim].index(TARGETS)
            rows = whole.take(places if alone else np.arange(targets), axis)
            error = distance(rows, np.concatenate(parts, axis))
            if error > _TOLERANCE:
                return f"output {out.name!r} differs by {error:.2g} of its size with {targets} targets"
    return None


def _row(inputs: Sequence[TensorSpec], feeds: Mapping[str, Array], i: int) -> dict[str, Array]:
    """One target with its user."""
    axes = {s.name: s.shape.index(TARGETS) for s in inputs if TARGETS in s.shape}
    return {n: x.take([i], axes[n]) if n in axes else x for n, x in feeds.items()}
