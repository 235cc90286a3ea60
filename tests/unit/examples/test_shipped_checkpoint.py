"""The checkpoint that ships is what its own metadata says it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stca.examples
from stca.examples.train.evaluate import auc_table
from stca.examples.train.train import score_with
from stca.export.checkpoint import Checkpoint, load_checkpoint

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


def test_it_is_that_good_here_too(checkpoint: Checkpoint) -> None:
    """A fraction of the recorded evaluation's users, so the bounds leave room for who they are."""
    rows = auc_table(score_with(checkpoint.build()), [512, 4096], users=16, targets=256)
    finish = [r for r in rows if r.task == "finish"]
    for row in finish:
        best, without = row.references["best"], row.references["no_history"]
        assert row.auc - without > 0.85 * (best - without)
    assert finish[1].auc > finish[0].auc + 0.03
