"""Which parts of a state and of the weights can be kept in 8 bits without the ranking moving: tried on a trace, under a
budget.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from stca.arrays import Progress
from stca.bundle import Bundle, place_for, seal, writing
from stca.calibration.choices import Options, Runner, formats_of, state_choices, weight_choices, with_ranges
from stca.calibration.quality import Budget, measure
from stca.calibration.quantized_bundle import formats_told, state_bytes, write_files
from stca.calibration.search import Found, Search
from stca.errors import UsageError
from stca.specs import TOKENS
from stca.trace import Traced


def calibrate(
    bundle: Bundle,
    trace: Callable[[], Iterable[Traced]],
    *,
    options: Options,
    budget: Budget,
    out: str | os.PathLike[str],
    run: Runner,
    tasks: Sequence[str],
    prove: Callable[[Bundle], Mapping[str, Any]],
    progress: Progress = lambda _: None,
) -> tuple[Bundle, Found]:
    """Write a bundle that is in 8 bits as far as the budget allows.

    All tensors are tried first. While the budget breaks, or the trace leaves it open, those are kept as they are that
    cost most for the bytes that they save; see `stca.calibration.search`.

    Args:
        bundle: in float32, with its own graphs.
        trace: begins the trace anew; each request is looked at alone, so it may be longer than memory.
        options: what becomes of it.
        budget: how far the ranking may move.
        out: where the new bundle goes.
        run: what computes scores and states.
        tasks: names of the scores' columns.
        prove: runs on the finished bundle before it gets its name, as for an export; its report is kept.
        progress: told each step as it starts.

    Returns:
        The bundle, and what was found.

    Raises:
        UsageError: when the trace cannot decide, or there is nothing to quantize.
        ParityError: when no tensor can be in 8 bits under the budget, naming the one to blame and the node it is from.
    """
    weights = weight_choices(bundle, options)
    candidates = state_choices(bundle, options, weights)
    if os.path.realpath(out) == os.path.realpath(bundle.path):
        raise UsageError(f"{out}: is the bundle to calibrate, which is compared with the new one; name another place")
    place_for(out)
    progress("float32 on the trace")
    labels = [r.labels for r in trace()] if budget.auc is not None else []
    budget.check_labels(labels)
    exact = list(run.scores(bundle, trace()))
    measure(exact, exact, labels, tasks, budget)  # what the trace lacks is said before the long work
    formats = dict(weights)
    if options.weights and options.activations == "tensor":
        progress("ranges of activations")
        formats |= with_ranges(bundle, formats, options.method, run, trace())
    if candidates:
        progress("ranges of the state")
        formats |= formats_of(bundle, candidates, options, run.states(bundle, trace()))
    judged = partial(measure, exact, labels=labels, tasks=tasks, budget=budget)
    found = Search(bundle, formats, trace, run, exact, judged, progress).found()
    return _finished(bundle, found, out, budget, prove, progress), found


def _finished(
    bundle: Bundle,
    found: Found,
    out: str | os.PathLike[str],
    budget: Budget,
    prove: Callable[[Bundle], Mapping[str, Any]],
    progress: Progress,
) -> Bundle:
    told = {
        **(formats_told(found.formats) or {}),
        "budget": {"auc": budget.auc, "top": {str(k): x for k, x in budget.top.items()}},
        "requests": found.requests,
        **found.as_dict(),
    }
    with writing(out) as (work, commit):
        progress("writing the bundle")
        split = bundle.manifest.split
        manifest = write_files(bundle, found.formats, work)
        rows = sum(s.bytes_per_token for s in manifest.state)
        split = {**split, "bytes_per_token": rows, "state_bytes": state_bytes(manifest, _tokens(split))}
        manifest = dataclasses.replace(manifest, quantization=told, split=split, parity={})
        parity = prove(seal(work, manifest))
        return commit(dataclasses.replace(manifest, parity=parity))


def _tokens(split: Mapping[str, Any]) -> int:
    return int(split.get("workload", {}).get(TOKENS, 10_000))
