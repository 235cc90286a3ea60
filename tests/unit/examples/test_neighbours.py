"""Similar users: who they are, what is read of them, and that a session joins their states."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stca.examples.train import neighbours as command
from stca.examples.train.neighbours import ALIKE, PAGE, Neighbours
from stca.examples.train.world import World, WorldConfig, generate

EVENTS = 512


@pytest.fixture(scope="module")
def made():
    return generate(World(WorldConfig(alike=ALIKE)), users=24, history=1024, targets=64, seed=3)


def test_the_most_similar_are_of_ones_kind(made):
    near = Neighbours(made.log, EVENTS, ALIKE - 1)
    kind = np.arange(24) // ALIKE
    assert (kind[near.users] == kind[:, None]).all()
    assert (near.users != np.arange(24)[:, None]).all()
    assert (np.diff(near.similarity, axis=1) <= 0).all()


def test_users_of_a_kind_share_tastes_and_no_events(made):
    np.testing.assert_array_equal(made.affinity[0], made.affinity[ALIKE - 1])
    assert not np.array_equal(made.affinity[0], made.affinity[ALIKE])
    first, second = made.log.item[:1024], made.log.item[1088:2112]
    assert not np.array_equal(first, second)


def test_nothing_is_read_that_came_after_the_request(made):
    near, log = Neighbours(made.log, EVENTS, 8), made.log
    request = log.training_requests(PAGE, EVENTS)[2]
    (own, _), *others = near.read(request)
    assert own == request
    assert len(others) == 8
    for one, events in others:
        assert len(events["history_action"]) <= EVENTS
        assert (log.time[log.history(one, EVENTS)] < log.time[request.cut]).all()
        assert one.cut + PAGE >= log.held_out[one.user] or log.time[one.cut + PAGE] >= log.time[request.cut]


def test_the_command_trains_both_and_joins_states(tmp_path, capsys):
    argv = ["--steps", "2", "--users", "12", "--history", "256", "--recent", "128", "--eval-users", "12", "--json"]
    assert command.main([*argv, "--bundle", str(tmp_path / "bundle")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert list(found) == ["own events alone", "with neighbours", "with neighbours, served"]
    for model, served in zip(found["with neighbours"], found["with neighbours, served"], strict=True):
        assert served["auc"] == pytest.approx(model["auc"], abs=1e-4)
    hits, misses = (int(err.split("states: ")[1].split()[i]) for i in (0, 2))
    assert hits > 0
    assert hits + misses == 12 * 9
