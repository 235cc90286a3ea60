"""Calls that come together are computed together, and none waits for what is large, slow or wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.errors import DeadlineError, EngineError, RequestError, UsageError
from stca.runtime import Request, Session
from stca.runtime.batching import Batcher
from stca.runtime.deadline import NEVER, Deadline
from stca.runtime.model import Model


def batcher(runs, most=10, seconds=60.0, wrong=()):
    def run(items, _):
        runs.append(sorted(items))
        if set(items) & set(wrong):
            raise EngineError("wrong")
        return [-x for x in items]

    return Batcher(run, most, seconds)


def together(made, items, costs):
    with ThreadPoolExecutor(len(items)) as pool:
        calls = [pool.submit(made.call, x, cost, NEVER) for x, cost in zip(items, costs, strict=True)]
        return [call.exception() or call.result() for call in calls]


def test_a_full_batch_waits_for_nobody_more():
    runs: list[list[int]] = []
    made = batcher(runs, most=10)
    with ThreadPoolExecutor(4) as pool:  # the last one finds no room, closes the batch and opens the next
        first = [pool.submit(made.call, x, 4, NEVER) for x in (1, 2)]
        while made._open is None or len(made._open.items) < 2:
            time.sleep(0.001)
        last = pool.submit(made.call, 3, 4, Deadline(0.05))
        assert [f.result() for f in first] == [-1, -2]
        with pytest.raises(DeadlineError):
            last.result()
    assert runs[0] == [1, 2]


def test_a_large_one_runs_at_once_and_alone():
    runs: list[list[int]] = []
    made = batcher(runs, most=10)
    with ThreadPoolExecutor(1) as pool:
        small = pool.submit(made.call, 1, 1, Deadline(600))
        while made._open is None:
            time.sleep(0.001)
        assert made.call(2, 10, NEVER) == -2
        assert not small.done()
        made._open.full.set()
        assert small.result() == -1
    assert runs == [[2], [1]]


def test_whoever_is_wrong_fails_alone():
    runs: list[list[int]] = []
    results = together(batcher(runs, most=100, seconds=0.3, wrong=[3]), [1, 2, 3, 4], [1] * 4)
    assert [results[i] for i in (0, 1, 3)] == [-1, -2, -4]
    assert isinstance(results[2], EngineError)


def test_a_caller_who_waits_no_longer_leaves_the_others(monkeypatch):
    runs: list[list[int]] = []
    made = batcher(runs, seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made.call, 1, 1, NEVER)
        while made._open is None:
            time.sleep(0.001)
        with one_line(DeadlineError):
            made.call(2, 1, Deadline(0.01))
        assert first.result() == -1


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


@pytest.mark.parametrize(("name", "value"), [("batch_seconds", 0), ("batch_seconds", "x"), ("batch_tokens", 0)])
def test_a_wrong_option_is_named(bundle_dir, name, value):
    with one_line(UsageError, name):
        Session.load(bundle_dir, **{name: value})
