"""Halves whose state is in 8 bits: held against the same halves in float64, which are as far off as the format is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from stca.arrays import Array
from stca.bundle import Bundle
from stca.checks.tolerance import StageParity, Tolerance, compare
from stca.export.passes.to_double import in_double
from stca.runtime.engine import scores_of
from stca.runtime.tables import Lookups
from stca.specs import HALVES

# The distance from 1 to the next number, or of two levels near the largest.
_EPS: Final = {"int8": 2.0**-7, "fp8": 2.0**-3}


def run_halves_double(bundle: Bundle, feeds: Sequence[Mapping[str, Array]]) -> list[Array]:
    """Scores of both halves joined, all but the kept state in float64."""
    encoder, scorer = (in_double(onnx.load(bundle.file(half))) for half in HALVES)
    before, between = (Lookups(bundle, half) for half in HALVES)
    names = [s.name for s in bundle.manifest.graphs["user_encoder"].outputs]
    made = []
    for given in feeds:
        state = encoder(before.complete(given))
        made.append(scores_of(scorer(between.complete({**given, **dict(zip(names, state, strict=True))}))))
    return made


def own_error(
    bundle: Bundle,
    feeds: Sequence[Mapping[str, Array]],
    against: str,
    reference: Sequence[Array],
    sizes: Sequence[Sequence[int]],
) -> StageParity:
    """What the format alone costs: the halves in float64 but for the kept state. It must keep half of its digits.

    Args:
        bundle: whose manifest has a `rounding`.
        feeds: of the request graph.
        against, reference: name and scores of the float64 reference.
        sizes: targets of each request of each batch.
    """
    kind = str(bundle.manifest.rounding)
    return compare(f"{kind} in float64", against, run_halves_double(bundle, feeds), reference, sizes, _EPS[kind], None)


def judged_quantized(
    bundle: Bundle,
    feeds: Sequence[Mapping[str, Array]],
    outcomes: Sequence[tuple[str, list[Array]]],
    against: str,
    reference: Sequence[Array],
    sizes: Sequence[Sequence[int]],
) -> list[StageParity]:
    """The format's own error, and what is served, which may be off by twice that.

    Args:
        outcomes: scores by stage, of what is served.
        bundle, feeds, against, reference, sizes: as of `own_error`.
    """
    yardstick = own_error(bundle, feeds, against, reference, sizes)
    eps = float(np.finfo(np.float32).eps)
    tolerance = Tolerance.of(yardstick.max_abs, reference, eps)
    return [yardstick, *(compare(n, against, x, reference, sizes, eps, tolerance) for n, x in outcomes)]
