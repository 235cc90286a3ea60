"""The checkpoint that ships is what its own metadata says it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import stca.examples
from stca.examples.train.evaluate import EVALUATION_SEED, auc
from stca.examples.train.train import score_with
from stca.examples.train.world import World, generate
from stca.export.reference.checkpoint import Checkpoint, load_checkpoint

FILE = Path(next(iter(stca.examples.__path__))) / "checkpoints" / "stca_demo.safetensors"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(FILE)


def test_small_and_user_scoped(checkpoint: Checkpoint) -> None:
    assert FILE.stat().st_size < 4_000_000
    assert checkpoint.config.time == "log"
    assert checkpoint.config.tasks == ("finish", "like")


def test_metadata_says_how_it_was_made_and_how_good_it_is(checkpoint: Checkpoint) -> None:
    training = json.loads(checkpoint.metadata["stca.training"])
    assert training["command"].startswith("python -m stca.examples.train ")
    assert training["max_history"] <= 2048
    rows = json.loads(checkpoint.metadata["stca.auc"])
    lengths = (512, 1024, 2048, 4096, 10_000)
    assert [(r["history"], r["task"]) for r in rows] == [(n, t) for n in lengths for t in ("finish", "like")]
    for task in ("finish", "like"):
        aucs = [r["auc"] for r in rows if r["task"] == task]
        assert aucs == sorted(aucs), "trained at no more than 2048, it goes on rising to 10 000"
    assert all(r["no_history"] < r["auc"] < r["best"] < r["limit"] for r in rows)


def with_deviation(figure: Callable[[Sequence[int]], float], users: int) -> tuple[float, float]:
    """A figure over all users and its standard error, by leaving out one user after the other (the jackknife).

    A user's targets share a history and a taste, so it is users that are independent, not targets.
    """
    others = np.array([figure([u for u in range(users) if u != left_out]) for left_out in range(users)])
    return figure(range(users)), float(np.sqrt((users - 1) * others.var()))


def test_it_is_that_good_here_too_and_better_with_10_000_events_than_with_2048(checkpoint: Checkpoint) -> None:
    """Fewer users than in the recorded evaluation, and others: so the same figures up to their standard error."""
    users, short, long = 24, 2048, 10_000
    score = score_with(checkpoint.build())
    made = generate(World(), users=users, history=long, targets=256, seed=EVALUATION_SEED)
    requests = made.log.held_out_requests()
    labels = [made.log.labels[r.cut : r.end, 0] for r in requests]

    def finish_auc(scores: list[NDArray[Any]], of: Sequence[int]) -> float:
        return auc(np.concatenate([scores[u] for u in of]), np.concatenate([labels[u] for u in of]))

    def lead(ahead: list[NDArray[Any]], behind: list[NDArray[Any]], of: Sequence[int]) -> float:
        return finish_auc(ahead, of) - finish_auc(behind, of)

    model = {n: [score(made.log.batch([r], [n])[0])[:, 0] for r in requests] for n in (short, long)}
    recorded = {r["history"]: r for r in json.loads(checkpoint.metadata["stca.auc"]) if r["task"] == "finish"}
    for n in (short, long):
        found, deviation = with_deviation(partial(finish_auc, model[n]), users)
        assert abs(found - recorded[n]["auc"]) < deviation
        # What is missing to the best possible on the same targets depends far less on who the users are.
        best = [made.best_scores(r, n)[:, 0] for r in requests]
        missing, deviation = with_deviation(partial(lead, best, model[n]), users)
        assert deviation < 0.0015
        assert abs(missing - (recorded[n]["best"] - recorded[n]["auc"])) < deviation
    gain, deviation = with_deviation(partial(lead, model[long], model[short]), users)
    assert gain > 4 * deviation
    assert abs(gain - (recorded[long]["auc"] - recorded[short]["auc"])) < deviation
