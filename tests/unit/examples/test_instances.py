"""Compressed instances: what they are made of, what a request hides, and that a late label amends a state."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stca.examples.train import instances as command
from stca.examples.train.instances import UNKNOWN, Instances
from stca.examples.train.world import SKIP, World, generate
from stca.runtime import Request, Session

ARGUMENTS = ("--users", "2", "--history", "160", "--recent", "32", "--eval-users", "2", "--steps", "2")


@pytest.fixture(scope="module")
def log():
    return generate(World(), users=2, history=192, targets=64, seed=3).log


def test_an_instance_knows_what_was_before_it(log):
    made = Instances(log)
    for row in (0, 100, 255, 256, 400):
        begin = 256 * (row // 256)
        alike = made.topic[begin:row] == made.topic[row]
        finished = (log.action[begin:row][alike] != SKIP).sum()
        expected = [np.log1p(alike.sum()) / 3, (finished + 1) / (alike.sum() + 2)]
        np.testing.assert_allclose(made.counts[row], expected, rtol=1e-6)


def test_a_request_reads_the_last_instance_of_each_topic(log):
    made, request = Instances(log), log.held_out_requests()[1]
    rows = made.before(request)
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 256
    assert rows.max() < request.cut
    assert sorted(made.topic[rows]) == sorted(set(made.topic[256 : request.cut]))
    assert not any(made.topic[row] in made.topic[row + 1 : request.cut] for row in rows)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iat") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr(command, "tell", lambda found, args: told.append(found))
        assert command.main([*ARGUMENTS, "--compressor-steps", "2", "--bundle", str(folder)]) == 0
    return folder, told[0]


def test_the_command_trains_both_and_serves_the_second(bundle):
    _, found = bundle
    assert list(found) == ["recent events alone", "with instances", "with instances, served"]
    without, model, served = ([row.as_dict() for row in rows] for rows in found.values())
    assert json.dumps(model) == json.dumps(served) != json.dumps(without)


def request(rng, instances=9, now=100):
    return {
        "instance": rng.integers(0, 50, instances),
        "instance_action": rng.integers(0, 3, instances),
        "instance_time": np.arange(instances) * 10,
        "recent_category": rng.integers(0, 256, (1, 32)),
        "recent_action": rng.integers(0, 3, (1, 32)),
        "user_segment": np.array([1]),
    }, {
        "request_device": np.array([0]),
        "request_time": np.array([now]),
        "target_item": rng.integers(0, 2048, 3),
        "target_category": rng.integers(0, 256, 3),
    }


def test_a_label_that_comes_late_amends_the_state(bundle):
    session = Session.load(bundle[0], threads=1)
    user, targets = request(np.random.default_rng(0))
    known = user["instance_action"][-1:].copy()
    user["instance_action"][-1] = UNKNOWN
    before = session.score(Request({**user, **targets}, "ann", 1))
    late = {"instance": user["instance"][-1:], "instance_action": known, "instance_time": user["instance_time"][-1:]}
    assert session.amend("ann", late, 2, at=-1, after=1)
    amended = session.score(Request(targets, "ann", 2))
    user["instance_action"][-1:] = known
    np.testing.assert_array_equal(amended, session.score(Request({**user, **targets})))
    assert not np.array_equal(amended, before)


def test_instances_after_the_request_are_hidden(bundle):
    session = Session.load(bundle[0], threads=1)
    user, targets = request(np.random.default_rng(0), now=50)
    per_token = [n for n in user if n.startswith("instance")]
    earlier = {n: x[:5] if n in per_token else x for n, x in user.items()}
    whole, cut = (session.score(Request({**one, **targets})) for one in (user, earlier))
    np.testing.assert_allclose(whole, cut, rtol=0, atol=1e-6)
    later = {**targets, "request_time": np.array([100])}
    assert not np.allclose(session.score(Request({**user, **later})), cut, atol=1e-6)
