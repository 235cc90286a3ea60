from __future__ import annotations

import math

import numpy as np
import pytest

from stca.errors import StcaError
from stca.examples.train.evaluate import AucRow, as_text, auc, auc_rows, auc_table, base_rates
from stca.examples.train.log import Inputs, Log
from stca.examples.train.world import World, WorldConfig, generate


def brute_force(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition: the chance that a positive is scored above a negative, ties counting half."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(pairs))


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_auc_is_its_definition_with_and_without_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 200) / 7
    labels = (rng.random(200) < 0.2 + 0.6 * scores / scores.max()).astype(np.uint8)
    assert auc(scores, labels) == pytest.approx(brute_force(scores, labels), abs=1e-12)


def test_auc_of_extremes() -> None:
    labels = np.array([0, 0, 1, 1])
    assert auc(np.array([1, 2, 3, 4]), labels) == 1.0
    assert auc(np.array([4, 3, 2, 1]), labels) == 0.0
    assert auc(np.zeros(4), labels) == 0.5
    assert math.isnan(auc(np.arange(4), np.ones(4)))


def test_no_auc_is_none_in_json() -> None:
    row = AucRow(8, "like", float("nan"), {"best": 0.5})
    assert row.as_dict() == {"history": 8, "task": "like", "auc": None, "best": 0.5}


def test_table_of_a_predictor_that_counts() -> None:
    """A score function made of the request's inputs alone, which gets the best possible AUC without shrinking."""
    world = World(WorldConfig(topics=8, items=64, prior_strength=2.0))
    seen: list[int] = []

    def finish_rate(inputs: Inputs) -> np.ndarray:
        seen.append(len(inputs["history_item"]))
        assert inputs["target_offsets"].tolist() == [0, 50]
        same = inputs["target_category"][:, None] == inputs["history_category"][None]
        finished = (same * (inputs["history_action"] > 0)).sum(axis=1)
        rate = (finished + 1) / (same.sum(axis=1) + 2)
        return np.stack([rate, rate * world.quality[inputs["target_item"]]], axis=1)

    rows = auc_table(finish_rate, [32, 512], users=20, targets=50, world=world)
    assert seen == [32] * 20 + [512] * 20
    assert [(r.history, r.task) for r in rows] == [(32, "finish"), (32, "like"), (512, "finish"), (512, "like")]
    for row in rows:
        assert row.references["no_history"] < row.auc < row.references["best"] + 0.01
        assert row.as_dict() == {"history": row.history, "task": row.task, "auc": row.auc, **row.references}
    assert rows[2].auc > rows[0].auc
    assert rows[2].auc == pytest.approx(rows[2].references["best"], abs=0.01)
    assert len(as_text(rows).splitlines()) == 5


def test_nothing_held_out() -> None:
    made = generate(World(WorldConfig(topics=8, items=64)), users=2, history=16, targets=0, seed=1)
    with pytest.raises(StcaError, match="holds no events out"):
        auc_rows(lambda x: x["target_item"][:, None], made.log, [8], lambda request, length: {})


def test_base_rates_use_training_events_alone() -> None:
    log = Log(
        user_offsets=np.array([0, 3, 6]),
        held_out=np.array([2, 5]),
        item=np.array([1, 2, 1, 1, 1, 2]),
        time=np.arange(6),
        action=np.zeros(6, np.int64),
        labels=np.array([[1], [0], [0], [1], [0], [1]], np.uint8),
        items=4,
        sizes={"action": 1},
        tasks=("label",),
    )
    references = base_rates(log, prior_events=2.0)
    overall = 2 / 4
    item = {1: (2 + 2 * overall) / (3 + 2), 2: (0 + 2 * overall) / (1 + 2)}
    first, second = (references(r, 8) for r in log.held_out_requests())
    assert first["popularity"].tolist() == [[3]]
    assert first["item_rate"][0, 0] == pytest.approx(item[1])
    assert second["item_rate"][0, 0] == pytest.approx(item[2])
    user = (1 + 2 * overall) / (2 + 2)
    assert second["item_and_user_rate"][0, 0] == pytest.approx(item[2] + user)
    rows = auc_rows(lambda x: x["target_item"][:, None], log, [8], references)
    assert rows[0].auc == 1.0  # item 2 is the positive one
    assert rows[0].references["popularity"] == 0.0
