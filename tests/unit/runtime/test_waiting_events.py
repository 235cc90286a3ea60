"""Events that wait beside a sum: nothing is lost that a request, another append or a failure meets on the way."""

from __future__ import annotations

import dataclasses
import random
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.errors import one_line

from stca.bundle import Bundle, seal, sha256_of
from stca.errors import EngineError, HistoryNeededError, RequestError
from stca.manifest import WEIGHTS
from stca.runtime import Request, Session, changing, user_states
from stca.runtime.deadline import Deadline
from stca.runtime.state import UserState

BUNDLE = Path(__file__).parents[1] / "runtime_cpp" / "golden" / "sums"
REST = {"hour": np.array([9]), "candidates": np.float32([1, 0.5])}


def history(*clicks, recent=(1, 2)):
    return {"clicks": np.array(clicks, np.int64), "recent": np.array(recent)}


def scores(clicks, recent=(1, 2), bias=0.0):
    """The bundle's model, as `golden_sums.py` writes it."""
    user = 2 * sum(clicks) + sum(recent)
    return [[np.float32(c * user + 1000 * sum(clicks) + 9 + bias)] for c in (1, 0.5)]


@pytest.fixture
def session():
    with Session.load(BUNDLE, threads=1) as made:
        made.score(Request({**history(3, 4), **REST}, "u", 1))
        assert made.append("u", history(5), 2)
        assert made._store.memory.find("u").state.waiting is not None
        yield made


def asked(session, version=2):
    return session.score(Request(REST, "u", version)).tolist()


@pytest.mark.parametrize("most", [0, 256])
def test_a_request_that_finishes_the_state_meanwhile_loses_no_event(session, monkeypatch, most):
    """Whether the append leaves its events waiting or not."""
    put_off, met = changing.put_off, []

    def meets_a_request(*arguments):
        late = put_off(*arguments)
        if not met:
            met.append(asked(session))
        return late

    monkeypatch.setattr(changing, "put_off", meets_a_request)
    monkeypatch.setattr(changing, "_MOST_PUT_OFF", most)
    assert session.append("u", history(6), 3, after=2)
    assert (met, asked(session, 3)) == ([scores([3, 4, 5])], scores([3, 4, 5, 6]))
    assert session.stats().appends == 2


def test_what_is_forgotten_meanwhile_is_not_appended_to(session, monkeypatch):
    put_off = changing.put_off
    monkeypatch.setattr(changing, "put_off", lambda *a: (put_off(*a), session.forget("u"))[0])
    assert not session.append("u", history(6), 3)


def test_one_finishes_for_all_who_ask_at_once(session, monkeypatch):
    finish, wait, begun, runs = changing.finish, Deadline.wait, threading.Semaphore(0), []

    def told(self, *arguments):
        begun.release()
        wait(self, *arguments)

    def after_all_came(*arguments):
        runs.append(1)
        assert all(begun.acquire(timeout=60) for _ in range(5))
        return finish(*arguments)

    monkeypatch.setattr(Deadline, "wait", told)
    monkeypatch.setattr(user_states, "finish", after_all_came)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: asked(session), range(6))) == [scores([3, 4, 5])] * 6
    assert (len(runs), session.stats().hits) == (1, 6)


def test_what_cannot_be_finished_is_not_kept(session, monkeypatch):
    def fails(feeds):
        raise EngineError("no memory")

    monkeypatch.setattr(session._model.grower, "run", fails)
    with pytest.raises(EngineError, match="no memory"):
        asked(session)
    with pytest.raises(HistoryNeededError):
        asked(session)
    whole = session.score(Request({**history(3, 4, 5), **REST}, "u", 2)).tolist()
    assert whole == asked(session) == scores([3, 4, 5])


def test_a_state_that_goes_while_it_is_finished_ahead_is_not_kept(session, monkeypatch):
    finish = changing.finish
    monkeypatch.setattr(user_states, "finish", lambda *a: (finish(*a), session.forget("u"))[0])
    assert not session.warm("u", {}, 2)
    assert session.stats().users == 0


def test_events_of_other_sizes_do_not_wait_together():
    door = SimpleNamespace(inputs={n: SimpleNamespace(shape=s) for n, s in (("e", ("K", "N_h")), ("now", ()))})
    model = SimpleNamespace(door=door, kept_sums=lambda _: {}, tokens=lambda arrays: arrays["e"].shape[1])
    state = UserState({}, 3)
    for events in (2, 1):
        state = changing.put_off(model, state, {"e": np.ones((4, events)), "now": np.array(events)})
    assert (state.tokens, state.waiting["e"].shape, state.waiting["now"]) == (6, (4, 3), 1)
    with one_line(RequestError, "e: has shape [5, 1], and the events before have [4, 3]", "all but axis 1"):
        changing.put_off(model, state, {"e": np.ones((5, 1)), "now": np.array(0)})


USERS, TTL, SHORTEST, LONGEST = 4, 100.0, 1, 6
WAYS = ("score", "hit", "hit", "append", "append", "append", "warm", "forget", "swap", "time passes")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Bundles of the same model with other weights, and the bias of each."""
    other = shutil.copytree(BUNDLE, tmp_path_factory.mktemp("sums") / "B")
    content = (other / WEIGHTS).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    bias = np.full_like(np.frombuffer(content[begin:], np.float32), 7)
    (other / WEIGHTS).write_bytes(content[:begin] + bias.tobytes())
    seal(other, dataclasses.replace(Bundle.load(BUNDLE).manifest, weights=sha256_of(other / WEIGHTS)))
    return ((BUNDLE, 0.0), (other, 7.0))


@pytest.mark.parametrize("max_users", [2, None])
def test_whatever_happens_scores_are_those_of_the_whole_history(sources, max_users):
    """Random calls: a user's history of version `n` is `n` clicks; time, swaps and other users make states go."""
    happened = Counter()
    for seed in range(20):
        rng, passed, served = random.Random(seed), 0.0, 0
        made = {}  # when the state of a user and version was made at the latest
        session = Session.load(sources[0][0], threads=1, max_users=max_users, ttl_seconds=TTL)
        session._store.memory._clock = lambda: passed  # noqa: B023
        for _ in range(60):
            way, user = rng.choice(WAYS), rng.randrange(USERS)
            version = rng.randint(SHORTEST, LONGEST)
            if made and rng.random() < 0.7:
                user, version = rng.choice([*made])
            clicks, recent = [(user + i) % 7 for i in range(version + 1)], (user, version)
            whole = history(*clicks[:version], recent=recent)
            right = scores(clicks[:version], recent, sources[served][1])
            may_be_kept = passed - made.get((user, version), -TTL) < TTL
            happened[way] += 1
            if way == "score":
                answer = session.answer(Request({**whole, **REST}, user, version))
                assert answer.scores.tolist() == right, seed
                assert may_be_kept or not answer.hits[0], seed
                if not answer.hits[0]:
                    made[user, version] = passed
            elif way == "hit":
                try:
                    assert session.score(Request(REST, user, version)).tolist() == right, seed
                    assert may_be_kept, seed
                    happened["found"] += 1
                except HistoryNeededError:
                    pass
            elif way == "append" and version < LONGEST:
                late = history(clicks[version], recent=(user, version + 1))
                if session.append(user, late, version + 1, after=version):
                    assert session._store.memory.find(user).key.version == version + 1
                    made[user, version + 1] = passed
                    happened["appended"] += 1
            elif way == "warm":
                warmed = session.stats().warmed
                assert session.warm(user, whole, version)
                if session.stats().warmed > warmed:
                    made[user, version] = passed
                assert session.answer(Request(REST, user, version)).hits == (True,), seed
            elif way == "forget":
                session.forget(user)
                made = {key: at for key, at in made.items() if key[0] != user}
            elif way == "swap":
                served = 1 - served
                session.swap(sources[served][0])
                made.clear()
            elif way == "time passes":
                passed += rng.uniform(0, TTL)
                users = session.stats().users  # before anybody is asked for, which drops whoever is too old
                assert users == sum(session._store.memory.find(u) is not None for u in range(USERS)), seed
        happened["evicted"] += session.stats().evictions
        happened["expired"] += session.stats().expired
    assert [way for way in (*WAYS, "found", "appended", "expired") if not happened[way]] == []
    assert (happened["evicted"] > 0) == (max_users is not None)
