"""Calls that come together are computed together, and none waits for what is large, slow or wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.errors import CancelledError, DeadlineError, EngineError, RequestError, UsageError
from stca.runtime import Request, Session
from stca.runtime.batching import Batcher
from stca.runtime.deadline import NEVER, Deadline
from stca.runtime.model import Model


class Counted:
    """A batcher of numbers, whose runs are kept, and wait until they are let go where `held` says so."""

    def __init__(self, most=10, seconds=0.0, places=1, wrong=(), held=()):
        self.runs: list[list[int]] = []
        self.wrong, self.held = set(wrong), set(held)
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        self.batcher = Batcher(self.run, most, seconds, places)
        self.call = self.batcher.call

    def run(self, items, deadline):
        self.runs.append(sorted(items))
        assert len(items) == 1 or deadline is NEVER, "one caller's deadline is not the others'"
        if self.held & set(items):
            self.began.release()
            assert self.go.wait(20)
        if self.wrong & set(items):
            raise EngineError("wrong")
        return [-x for x in items]

    def waiting(self):
        with self.batcher._lock:
            return [
                sorted(b.items.values()) for lane in (self.batcher._small, self.batcher._large) for b in lane.waiting
            ]


def until(true):
    for _ in range(4000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to that")


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as made:
        yield made


def held_up(made, pool, *items, cost=1, deadline=NEVER):
    """Calls that come one after the other while the place is taken."""
    calls = []
    for item in items:
        calls.append(pool.submit(made.call, item, cost, deadline))
        until(lambda item=item: any(item in batch for batch in made.waiting()))
    return calls


def test_who_comes_alone_waits_for_nobody_and_who_finds_no_place_is_gathered(pool):
    made = Counted(held=[1])
    first = pool.submit(made.call, 1, 1, NEVER)
    made.began.acquire()
    rest = held_up(made, pool, 2, 3, 4, deadline=Deadline(600))
    assert made.runs == [[1]]
    made.go.set()
    assert [call.result() for call in (first, *rest)] == [-1, -2, -3, -4]
    assert made.runs == [[1], [2, 3, 4]]
    told = made.batcher.runs()
    assert {n: r.times for n, r in told.items()} == {1: 1, 3: 1}
    assert told[1].seconds > 0


def test_a_full_batch_takes_nobody_more_and_batches_run_in_their_order(pool):
    made = Counted(most=9, held=[1])
    first = pool.submit(made.call, 1, 4, NEVER)
    made.began.acquire()
    rest = held_up(made, pool, 2, 3, 4, 5, cost=4)
    assert made.waiting() == [[2, 3], [4, 5]]
    made.go.set()
    assert [call.result() for call in (first, *rest)] == [-1, -2, -3, -4, -5]
    assert made.runs == [[1], [2, 3], [4, 5]]


def test_places_run_side_by_side_and_no_more_than_they_are(pool):
    made = Counted(places=2, most=2, held=range(1, 9))
    calls = [pool.submit(made.call, x, 1, NEVER) for x in (1, 2)]
    for _ in calls:
        made.began.acquire()
    calls += held_up(made, pool, 3, 4, 5)
    assert made.runs in ([[1], [2]], [[2], [1]])
    made.go.set()
    assert [call.result() for call in calls] == [-1, -2, -3, -4, -5]
    assert made.runs[2:] == [[3, 4], [5]]


def test_large_ones_run_alone_and_no_small_one_waits_for_them(pool):
    made = Counted(most=10, held=[100, 200])
    large = pool.submit(made.call, 100, 10, NEVER)
    made.began.acquire()
    large_too = held_up(made, pool, 200, cost=50)
    assert [pool.submit(made.call, x, 1, NEVER).result(20) for x in (1, 2)] == [-1, -2]
    assert made.runs == [[100], [1], [2]]
    made.go.set()
    assert [call.result() for call in (large, *large_too)] == [-100, -200]
    assert made.runs[3:] == [[200]]


def test_company_is_waited_for_where_that_is_asked(pool):
    made = Counted(most=2, seconds=600)
    calls = [pool.submit(made.call, x, 1, NEVER) for x in (1, 2)]
    assert [call.result(20) for call in calls] == [-1, -2], "full, and so without the wait"
    assert made.runs == [[1, 2]]
    made = Counted(most=3, seconds=0.05)
    assert made.call(1, 1, NEVER) == -1
    assert made.call(2, 1, Deadline(600)) == -2


def test_whoever_is_wrong_fails_alone(pool):
    made = Counted(wrong=[3], held=[0])
    first = pool.submit(made.call, 0, 1, NEVER)
    made.began.acquire()
    calls = held_up(made, pool, 1, 2, 3, 4)
    made.go.set()
    assert [call.result() for call in (first, calls[0], calls[1], calls[3])] == [0, -1, -2, -4]
    with one_line(EngineError):
        calls[2].result()


def test_who_waits_no_longer_is_not_computed_and_leaves_the_others(pool):
    made = Counted(most=4, held=[1])
    first = pool.submit(made.call, 1, 1, NEVER)
    made.began.acquire()
    late, gone = Deadline(600), Deadline(600)
    leaves = held_up(made, pool, 3, deadline=late) + held_up(made, pool, 4, cost=3, deadline=gone)
    stays = held_up(made, pool, 5, cost=2)
    assert made.waiting() == [[3, 4], [5]]
    late.cancel()
    gone.cancel()
    for call in leaves:
        with one_line(CancelledError):
            call.result()
    with one_line(DeadlineError):
        made.call(6, 1, Deadline(0.01))
    assert made.waiting() == [[5]]
    made.go.set()
    assert [first.result(), stays[0].result()] == [-1, -5]
    assert made.runs == [[1], [5]]


@pytest.fixture
def asked(log_session):
    specs = log_session.manifest.graphs["request"].inputs
    return [probe.single(specs, 3 + i, 2 + i, np.random.default_rng(i)) for i in range(6)]


def test_a_sessions_callers_get_their_own_scores(bundle_dir, log_session, asked, monkeypatch):
    expected = [log_session.score(Request(x)) for x in asked]
    session = Session.load(bundle_dir, threads=1, batch_seconds=10, batch_tokens=60)  # all six fill it
    encode, users, gate = Model.encode, [], threading.Barrier(6)

    def watched(model, those, *more):
        users.append(len(those))
        return encode(model, those, *more)

    monkeypatch.setattr(Model, "encode", watched)

    def score(i):
        gate.wait()
        return session.answer(Request(asked[i], i, i))

    for hits in (False, True):
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(score, range(6)))
        for answer, scores in zip(answers, expected, strict=True):
            np.testing.assert_allclose(answer.scores, scores, rtol=0, atol=2e-6)
            assert answer.hits == (hits,)
            assert list(answer.seconds) == ["check", "encode", "score"]
    assert users == [6], "all went through the encoder in one call, and none again"
    with one_line(RequestError, "history_item"):
        session.score(Request({**asked[0], "history_item": [-1] * 3}))


def test_who_waits_for_a_state_that_is_being_made_keeps_nobody_waiting(bundle_dir, asked, monkeypatch, pool):
    session = Session.load(bundle_dir, threads=1, batch_seconds=0, batch_tokens=8)
    encode, began, go = Model.encode, threading.Event(), threading.Event()

    def held(model, users, *more):
        if len(users[0]["history_item"]) == 7:
            began.set()
            assert go.wait(20)
        return encode(model, users, *more)

    monkeypatch.setattr(Model, "encode", held)
    targets = {n for s in session.manifest.graphs["request"].inputs if s.scope != "user" for n in [s.name]}
    rest = {n: x for n, x in asked[4].items() if n in targets}
    long = pool.submit(session.answer, Request(asked[4], "ann", 1))
    assert began.wait(20)
    joined = pool.submit(session.answer, Request(rest, "ann", 1))
    small = [pool.submit(session.answer, Request(asked[0], i, 1)) for i in range(6)]
    assert [call.result(20).hits for call in small] == [(False,)] * 6
    go.set()
    assert [call.result(20).hits for call in (long, joined)] == [(False,), (True,)]
    assert sum(n * runs.times for n, runs in session.runs().items()) == 8


@pytest.mark.parametrize(("name", "value"), [("batch_seconds", -1), ("batch_seconds", "x"), ("batch_tokens", 0)])
def test_a_wrong_option_is_named(bundle_dir, name, value):
    with one_line(UsageError, name):
        Session.load(bundle_dir, **{name: value})
