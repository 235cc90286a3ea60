"""The generated log has the statistics its documentation claims, and its optimum is one."""

from __future__ import annotations

import numpy as np
import pytest

from stca.examples.train.evaluate import auc
from stca.examples.train.world import (
    DAY,
    DEVICE_EASE,
    LIKE,
    SEGMENT_MEANS,
    SKIP,
    GeneratedLog,
    World,
    WorldConfig,
    generate,
)


@pytest.fixture(scope="module")
def made() -> GeneratedLog:
    world = World(WorldConfig(topics=40, items=200, page=16))
    return generate(world, users=120, history=400, targets=200, seed=3)


def test_layout(made: GeneratedLog) -> None:
    log = made.log
    assert log.users == 120
    assert (np.diff(log.user_offsets) == 600).all()
    assert (log.held_out - log.user_offsets[:-1] == 400).all()
    assert [len(c) for c in (log.item, log.time, log.action, log.labels, log.request_fields["device"])] == [72_000] * 5
    # A like implies a finish, and labels say what the action does.
    assert (log.labels[:, 0] == (log.action != SKIP)).all()
    assert (log.labels[:, 1] == (log.action == LIKE)).all()
    # One device per request: pages of 16, then the held-out events as one.
    device = log.request_fields["device"].reshape(120, 600)
    assert (device[:, :400].reshape(120, 25, 16) == device[:, :400:16, None]).all()
    assert (device[:, 400:] == device[:, 400:401]).all()


def test_items_are_drawn_from_their_topic_evenly() -> None:
    world = World(WorldConfig(topics=7, items=30))  # topics of 4 and 5 items
    topic = np.repeat(np.arange(7), 2000)
    items = world.draw_items(np.random.default_rng(0), topic)
    assert (world.category[items] == topic).all()
    drawn = np.bincount(items, minlength=30)
    expected = 2000 / np.bincount(world.category)[world.category]
    assert (abs(drawn - expected) < 4 * np.sqrt(expected)).all()


def test_same_seed_same_log_and_another_seed_other_users() -> None:
    world = World(WorldConfig(topics=8, items=32))
    first, again, other = (generate(world, users=3, history=50, targets=5, seed=s).log for s in (1, 1, 2))
    assert (first.item == again.item).all()
    assert (first.time == again.time).all()
    assert (first.item != other.item).any()


def test_times_increase_with_the_rhythm_of_a_day(made: GeneratedLog) -> None:
    time = made.log.time.reshape(120, 600)
    assert (np.diff(time, axis=1) >= 1).all()
    by_hour = np.bincount((made.log.time % DAY) // 3600, minlength=24) / len(made.log.time)
    assert by_hour[20] > 4 * by_hour[3]


def test_actions_have_the_probabilities_documented(made: GeneratedLog) -> None:
    log, world = made.log, made.world
    user = np.repeat(np.arange(log.users), 600)
    p = made.affinity[user, world.category[log.item]]
    # Counts against their expectation, in standard deviations of a sum of independent events.
    for seen, chance in (
        (log.labels[:, 0], p),
        (log.labels[:, 1], p * world.quality[log.item] * np.array(DEVICE_EASE)[log.request_fields["device"]]),
    ):
        for part in (chance < 0.3, chance >= 0.3):
            deviation = np.sqrt((chance * (1 - chance))[part].sum())
            assert abs(seen[part].sum() - chance[part].sum()) < 4 * deviation
    mean = np.array(SEGMENT_MEANS)[log.user_fields["segment"]]
    assert np.abs(made.affinity.mean(axis=1) - mean).mean() < 0.06


def test_best_scores_are_the_posterior_counted_by_hand(made: GeneratedLog) -> None:
    request = made.log.held_out_requests()[7]
    strength = made.world.config.prior_strength
    mean = SEGMENT_MEANS[int(made.log.user_fields["segment"][request.user])]
    scores = made.best_scores(request, 100)
    for k, row in enumerate(range(request.cut, request.end)):
        topic = made.world.category[made.log.item[row]]
        shown = finished = 0
        for past in range(request.cut - 100, request.cut):
            if made.world.category[made.log.item[past]] == topic:
                shown += 1
                finished += int(made.log.action[past] != SKIP)
        finish = (strength * mean + finished) / (strength + shown)
        ease = DEVICE_EASE[int(made.log.request_fields["device"][row])]
        assert scores[k] == pytest.approx([finish, finish * made.world.quality[made.log.item[row]] * ease])


def test_best_scores_are_calibrated(made: GeneratedLog) -> None:
    """Of the pairs given a probability, that share is positive: what makes it the posterior, and so the optimum."""
    requests = made.log.held_out_requests()
    scores = np.concatenate([made.best_scores(r, 100) for r in requests])
    labels = np.concatenate([made.log.labels[r.cut : r.end] for r in requests])
    for t in range(2):
        for part in np.array_split(np.argsort(scores[:, t]), 5):
            p, seen = scores[part, t], labels[part, t].mean()
            # A user's targets share one estimate per topic, so errors are wider than for independent pairs.
            assert abs(seen - p.mean()) < 6 * np.sqrt((p * (1 - p)).mean() / len(part))


def test_no_perturbed_predictor_beats_the_best(made: GeneratedLog) -> None:
    requests = made.log.held_out_requests()
    labels = np.concatenate([made.log.labels[r.cut : r.end] for r in requests])

    def measure(scores: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(scores)
        return np.array([auc(joined[:, t], labels[:, t]) for t in range(2)])

    best = measure([made.best_scores(r, 200) for r in requests])
    rng = np.random.default_rng(0)
    noisy = measure(
        [np.log(s) + 0.3 * rng.standard_normal(s.shape) for s in (made.best_scores(r, 200) for r in requests)]
    )
    shorter = measure([made.best_scores(r, 100) for r in requests])
    none = measure([made.best_scores(r, 0) for r in requests])
    # The oldest events of the window instead of the most recent suffix: one topic's events mistaken for another's.
    shuffled = measure([np.roll(made.best_scores(r, 200), 1, axis=0) for r in requests])
    for worse in (noisy, shorter, none, shuffled):
        assert (worse < best - 0.005).all()


def test_longer_history_helps_up_to_the_limit(made: GeneratedLog) -> None:
    requests = made.log.held_out_requests()
    labels = np.concatenate([made.log.labels[r.cut : r.end, 0] for r in requests])
    by_length = [
        auc(np.concatenate([made.best_scores(r, n)[:, 0] for r in requests]), labels)
        for n in (0, 25, 50, 100, 200, 400)
    ]
    limit = auc(np.concatenate([made.limit_scores(r)[:, 0] for r in requests]), labels)
    assert by_length == sorted(by_length)
    assert limit > by_length[-1]
