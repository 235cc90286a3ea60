"""Requests cut out of a log: suffixes, gaps, offsets."""

from __future__ import annotations

import numpy as np
import pytest

from stca.examples.train.log import Log, LoggedRequest


@pytest.fixture
def log() -> Log:
    """Users with 5, 0 and 3 events; the last 2 and 1 are held out."""
    return Log(
        user_offsets=np.array([0, 5, 5, 8]),
        held_out=np.array([3, 5, 7]),
        item=np.array([1, 2, 3, 4, 5, 6, 7, 8]),
        time=np.array([10, 20, 40, 70, 110, 100, 101, 103]),
        action=np.array([0, 1, 0, 1, 1, 0, 1, 0]),
        labels=np.array([[0], [1], [0], [1], [1], [0], [1], [0]], np.uint8),
        items=9,
        sizes={"action": 2, "category": 3, "age": 4, "device": 2},
        tasks=("label",),
        event_fields={"category": np.array([0, 1, 2, 0, 1, 2, 0, 1])},
        user_fields={"age": np.array([3, 2, 1])},
        request_fields={"device": np.array([0, 0, 0, 1, 1, 0, 0, 1])},
    )


def test_requests(log: Log) -> None:
    assert log.held_out_requests() == [LoggedRequest(0, 3, 5), LoggedRequest(2, 7, 8)]
    assert log.training_requests(2) == [LoggedRequest(0, 0, 2), LoggedRequest(0, 2, 3), LoggedRequest(2, 5, 7)]
    assert log.training_requests(2, least_history=1) == [LoggedRequest(0, 1, 3), LoggedRequest(2, 6, 7)]
    assert log.training_requests(8, least_history=2) == [LoggedRequest(0, 2, 3)]
    assert log.training_requests(2, least_history=3) == []


def test_every_training_event_after_the_least_history_is_a_target_once(log: Log) -> None:
    for targets in (1, 2, 3, 64):
        for least in range(5):
            rows = [row for r in log.training_requests(targets, least) for row in range(r.cut, r.end)]
            assert rows == [*range(least, 3), *range(5 + least, 7)]


def test_batch_keeps_the_most_recent_suffix(log: Log) -> None:
    inputs, labels = log.batch(log.held_out_requests(), [2, 100])
    expected = {
        "history_item": [2, 3, 6, 7],
        "history_action": [1, 0, 0, 1],
        "history_category": [1, 2, 2, 0],
        "history_time": [20, 40, 100, 101],
        "history_gap": [10, 20, 0, 1],  # 10 to the event that was cut off; 0 at a user's very first
        "history_offsets": [0, 2, 4],
        "user_age": [3, 1],
        "request_device": [1, 1],
        "target_item": [4, 5, 8],
        "target_category": [0, 1, 1],
        "target_offsets": [0, 2, 3],
    }
    assert {name: column.tolist() for name, column in inputs.items()} == expected
    assert all(c.dtype == (np.int32 if n.endswith("offsets") else np.int64) for n, c in inputs.items())
    assert labels.tolist() == [[1], [1], [0]]
    assert labels.dtype == np.float32


def test_batch_with_the_request_time(log: Log) -> None:
    inputs, _ = log.batch([LoggedRequest(0, 3, 5)], [1], request_time=True)
    assert inputs["request_time"].tolist() == [70]


def test_empty_histories(log: Log) -> None:
    inputs, _ = log.batch([LoggedRequest(0, 0, 2), LoggedRequest(2, 7, 8)], [8, 0])
    assert inputs["history_offsets"].tolist() == [0, 0, 0]
    assert len(inputs["history_gap"]) == 0
