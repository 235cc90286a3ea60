"""The short form of the soak, and that it sees wrong scores, errors and growth."""

from __future__ import annotations

import numpy as np
import pytest
import soak


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return soak.other_weights(tmp_path_factory.mktemp("soak") / "other")


def test_the_short_form():
    """Too short to say anything of memory, which still warms up."""
    result = soak.soak(2.5, threads=16, pause=0.02, seed=1)
    assert (result["wrong"], result["unexplained"], result["within_budget"]) == ([], [], True)
    assert {"swap", "append", "hit", "score", "batch", "forget"} <= result["counts"].keys()
    assert result["evictions"] > 0


def test_the_two_bundles_score_differently(other):
    one, two = (soak.Truth([source]) for source in (soak.GOLDEN, other))
    assert not one.right(0, 9, two._scores[0, 9][0])
    assert not one.right(0, 9, one._scores[0, 10][0])
    assert soak.Truth([soak.GOLDEN, other]).right(0, 9, two._scores[0, 9][0])


@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y[:1], lambda y: {}["x"]])
def test_what_goes_wrong_is_seen(other, monkeypatch, wrong):
    truth = soak.Truth([soak.GOLDEN])
    work = soak.Soak(soak.GOLDEN, truth, 1)
    right = soak.Session.score
    monkeypatch.setattr(soak.Session, "score", lambda *args: wrong(right(*args)))
    work.run(2, 0.2)
    assert work.wrong or any("KeyError" in what for what in work.unexplained)


def test_growth_after_the_warm_up_is_seen():
    grows, warms = np.linspace(1e8, 2e8, 100), np.minimum(np.linspace(1e8, 1e9, 100), 2e8)
    assert not soak.growth(grows.astype(int).tolist())["flat"]
    assert soak.growth(warms.astype(int).tolist())["flat"]


def test_memory_is_told_by_fifths():
    resident = [mib << 20 for mib in (1, 2, 3, 10, 10, 10, 20, 20, 20, 30, 30, 30, 40, 41, 42)]
    assert soak.growth(resident)["mib_by_fifth"] == [2.0, 10.0, 20.0, 30.0, 41.0]
