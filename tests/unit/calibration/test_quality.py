"""AUC and the best targets against brute force, intervals against resampling, and what a budget makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from support.errors import one_line

from stca.calibration.quality import Budget, Estimate, Measure, auc, auc_change, measure
from stca.errors import UsageError


def by_pairs(scores, labels):
    """AUC as it is defined."""
    pairs = scores[labels > 0][:, None] - scores[labels == 0][None]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


def drawn(rng, requests=40, targets=30, noise=0.3):
    """Scores of requests that differ from each other, ties among them, and labels that follow them."""
    exact, found, labels = [], [], []
    for _ in range(requests):
        x = np.round(rng.standard_normal(targets) + rng.standard_normal(), 1)
        exact.append(x)
        found.append(x + noise * rng.standard_normal(targets))
        labels.append((rng.random(targets) < 1 / (1 + np.exp(-x))).astype(np.float32))
    return exact, found, labels


def test_auc_is_the_share_of_ordered_pairs(rng):
    exact, found, labels = drawn(rng)
    own, change = auc_change(exact, found, labels, "t")
    a, b, y = map(np.concatenate, (exact, found, labels))
    assert own == pytest.approx(by_pairs(a, y), abs=1e-12) == auc(a, y)
    assert change.value == pytest.approx(by_pairs(b, y) - by_pairs(a, y), abs=1e-12)
    assert np.isnan(auc(a, np.ones_like(a)))


def test_labels_that_nobody_knows_are_left_out(rng):
    exact, found, labels = drawn(rng)
    some = [np.where(rng.random(len(y)) < 0.5, np.nan, y) for y in labels]
    own, _ = auc_change(exact, found, some, "t")
    a, y = np.concatenate(exact), np.concatenate(some)
    assert own == pytest.approx(by_pairs(a[np.isfinite(y)], y[np.isfinite(y)]))


def test_the_interval_of_auc_is_that_of_resampled_requests():
    rng = np.random.default_rng(1)
    exact, found, labels = drawn(rng, requests=60)
    _, change = auc_change(exact, found, labels, "t")
    resampled = []
    for _ in range(300):
        pick = rng.integers(0, 60, 60)
        parts = ([x[i] for i in pick] for x in (exact, found, labels))
        resampled.append(auc_change(*parts, "t")[1].value)
    assert (change.high - change.low) / 2 / 1.96 == pytest.approx(np.std(resampled), rel=0.25)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    exact, found, labels = drawn(rng, requests=4000)
    truth = auc_change(exact, found, labels, "t")[1].value
    held = 0
    for i in range(100):
        part = slice(40 * i, 40 * i + 40)
        e = auc_change(exact[part], found[part], labels[part], "t")[1]
        held += e.low <= truth <= e.high
    assert held >= 88


def test_the_best_are_counted_with_their_ties():
    labels = [None] * 8
    exact = [np.array([[5.0], [4.0], [4.0], [1.0]])] * 8
    swapped = [np.array([[5.0], [3.9], [4.0], [1.0]])] * 8
    lost = [np.array([[5.0], [3.9], [3.9], [4.5]])] * 8
    budget = Budget.parse("top2=0.9")
    assert measure(exact, swapped, labels, ["t"], budget)[0].estimate.value == 1.0
    assert measure(exact, lost, labels, ["t"], budget)[0].estimate.value == 0.5
    assert measure(exact, lost, labels, ["t"], budget)[0].verdict == "broken"


def test_what_any_scores_would_hold_decides_nothing():
    exact = [np.array([[5.0], [4.0], [3.0], [1.0]])] * 8
    for few in (exact, [*exact[:7], np.ones((9, 1))]):  # all of k targets are the best k
        with one_line(UsageError, "more than 4 targets", "top4 needs 8"):
            measure(few, few, [None] * 8, ["t"], Budget.parse("top4=0.5"))
    labels = [np.array([[1.0], [0.0], [0.0], [np.nan]]), *[np.full((4, 1), np.nan)] * 6, None]
    with one_line(UsageError, "1 requests of the trace have labels of task t", "auc needs 8"):
        measure(exact, exact, labels, ["t"], Budget.parse("auc=0.1"))


@pytest.mark.parametrize(
    ("estimate", "bound", "exact", "verdict"),
    [
        (Estimate(0.0001, -0.0001, 0.0003), 0.0005, 0.8, "holds"),
        (Estimate(-0.0001, -0.0007, 0.0005), 0.0005, 0.8, "undecided"),
        (Estimate(-0.0006, -0.0007, -0.0005), 0.0005, 0.8, "broken"),
        (Estimate(0.0006, 0.0001, 0.0011), 0.0005, 0.8, "broken"),
        (Estimate(0.995, 0.991, 0.999), 0.99, None, "holds"),
        (Estimate(0.995, 0.98, 1.0), 0.99, None, "undecided"),
        (Estimate(0.98, 0.97, 0.995), 0.99, None, "broken"),
    ],
)
def test_verdicts(estimate, bound, exact, verdict):
    assert Measure("m", estimate, bound, exact).verdict == verdict


def test_more_requests_are_asked_for_by_the_square():
    open_ = Measure("auc t", Estimate(0.0, -0.001, 0.001), 0.0005, 0.8)
    assert open_.requests_needed(100) == 400
    assert Measure("top10 t", Estimate(0.995, 0.985, 1.005), 0.99).requests_needed(100) == 400


@pytest.mark.parametrize("text", ["", "auc", "auc=0", "auc=x", "top=0.9", "top0=0.9", "top10=1.1", "ndcg=1", "auc=nan"])
def test_what_is_no_budget(text):
    with pytest.raises(UsageError, match="is no bound"):
        Budget.parse(text)


def test_too_few_requests_and_labels_of_one_kind(rng):
    exact, found, labels = drawn(rng, requests=8)
    columns = [[x[:, None] for x in s] for s in (exact, found, labels)]
    assert measure(*columns, ["t"], Budget.parse("auc=0.5,top10=0.1"))
    with pytest.raises(UsageError, match="has 7 requests"):
        measure(*[c[:7] for c in columns], ["t"], Budget.parse("top10=0.1"))
    with pytest.raises(UsageError, match="all negative"):
        measure(columns[0], columns[1], [np.zeros_like(x) for x in columns[2]], ["t"], Budget.parse("auc=0.5"))
