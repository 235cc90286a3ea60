"""States made ahead of their requests, and answers that are wanted for a while only."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.errors import CancelledError, DeadlineError, EngineError, HistoryNeededError, RequestError, UsageError
from stca.runtime import Deadline, Request, RequestBatch, Session
from stca.runtime.model import Model

ROUNDING = {"rtol": 0, "atol": 2e-6}


@pytest.fixture
def specs(log_session):
    return log_session.manifest.graphs["request"].inputs


@pytest.fixture
def inputs(specs):
    return probe.single(specs, 9, 4, np.random.default_rng(0))


def part(specs, inputs, *scopes):
    return {n: x for n, x in inputs.items() if n in {s.name for s in specs if s.scope in scopes}}


def told(session):
    s = session.stats()
    return s.hits, s.misses, s.warmed


class Gate:
    """Holds what the user encoder made until it is opened; `reached` once someone is there."""

    def __init__(self, monkeypatch, *, fails=False):
        self.reached, self.opened, self.runs = threading.Event(), threading.Event(), 0
        encode = Model.encode

        def gated(model, users, *more):
            self.runs += 1
            first = self.runs == 1
            states = list(encode(model, users, *more))
            self.reached.set()
            assert self.opened.wait(60)
            if fails and first:
                raise EngineError("out of memory")
            return states

        monkeypatch.setattr(Model, "encode", gated)


class Call(threading.Thread):
    """A call in a thread of its own, begun at once."""

    def __init__(self, call):
        super().__init__()
        self._call, self.result, self.error = call, None, None
        self.start()

    def run(self):
        try:
            self.result = self._call()
        except Exception as e:
            self.error = e

    def done(self):
        self.join(60)
        assert not self.is_alive()
        return self.result


# --- warm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", None])
def test_a_warmed_user_is_a_hit(log_session, specs, inputs, version):
    expected = log_session.score(Request(inputs))
    assert log_session.warm("ann", part(specs, inputs, "user"), version) is True
    assert told(log_session) == (0, 0, 1)
    assert np.array_equal(log_session.score(Request(inputs, "ann", version)), expected)
    assert told(log_session) == (1, 0, 1)
    assert log_session.warm("ann", part(specs, inputs, "user"), version) is True, "nothing to be made again"
    assert told(log_session) == (1, 0, 1)


def test_what_is_kept_is_warm_without_its_history(log_session, specs, inputs):
    with one_line(HistoryNeededError, "'ann'", "'v1'", "send the user inputs"):
        log_session.warm("ann", {}, "v1")
    log_session.warm("ann", inputs, "v1")
    assert log_session.warm("ann", {}, "v1")
    with one_line(HistoryNeededError, "'v2'"):
        log_session.warm("ann", {}, "v2")


def test_a_wrong_warm_is_refused_as_a_request_is(log_session, specs, inputs):
    history = part(specs, inputs, "user")
    for user, sent, version, words in (
        (None, history, "v1", ("user", "None")),
        ([1], history, "v1", ("user",)),
        ("ann", history, [1], ("version",)),
        ("ann", 5, "v1", ("history", "int")),
        ("ann", {**history, "color": [1]}, "v1", ("color", "no such input")),
        ("ann", {**history, "history_item": [-1] * 9}, "v1", ("history_item", "-1")),
        ("ann", {n: x for n, x in history.items() if n != "user_segment"}, "v1", ("user_segment", "missing")),
    ):
        with one_line(RequestError, *words):
            log_session.warm(user, sent, version)
    assert (log_session.stats().users, log_session.stats().warmed) == (0, 0)
    log_session.close()
    with one_line(EngineError, "closed"):
        log_session.warm("ann", history, "v1")


def test_what_cannot_be_kept_is_not_warm(bundle_dir, specs, inputs):
    session = Session.load(bundle_dir, threads=1, cache_bytes=100)
    assert session.warm("ann", inputs, "v1") is False


def test_a_score_joins_the_warm_under_way(log_session, specs, inputs, monkeypatch):
    """With its history or without: it is encoded once, and the score is a hit."""
    expected = log_session.score(Request(inputs))
    gate = Gate(monkeypatch)
    warm = Call(lambda: log_session.warm("ann", inputs, "v1"))
    assert gate.reached.wait(60)
    rest = part(specs, inputs, "request", "target")
    scores = [Call(lambda x=x: log_session.answer(Request(x, "ann", "v1"))) for x in (inputs, rest)]
    while len(log_session._turns._running) < 3:
        time.sleep(0.001)
    gate.opened.set()
    assert warm.done() is True
    for score in scores:
        assert np.array_equal(score.done().scores, expected)
        assert score.result.hits == (True,)
    assert gate.runs == 1
    assert told(log_session) == (2, 0, 1)


def test_where_a_warm_fails_the_score_goes_on(log_session, specs, inputs, monkeypatch):
    expected = log_session.score(Request(inputs))
    gate = Gate(monkeypatch, fails=True)
    warm = Call(lambda: log_session.warm("ann", inputs, "v1"))
    assert gate.reached.wait(60)
    rest = part(specs, inputs, "request", "target")
    score, bare = (Call(lambda x=x: log_session.score(Request(x, "ann", "v1"))) for x in (inputs, rest))
    while len(log_session._turns._running) < 3:
        time.sleep(0.001)
    gate.opened.set()
    warm.done()
    assert isinstance(warm.error, EngineError)
    assert np.array_equal(score.done(), expected)
    bare.done()
    assert bare.error is None or isinstance(bare.error, HistoryNeededError), "whoever came first had to make it"


def test_a_forgotten_user_is_not_warm(log_session, inputs, monkeypatch):
    gate = Gate(monkeypatch)
    warm = Call(lambda: log_session.warm("ann", inputs, "v1"))
    assert gate.reached.wait(60)
    assert log_session.forget("ann")
    gate.opened.set()
    assert warm.done() is False
    assert log_session.stats().users == 0


def test_a_warm_waits_for_scores_and_no_score_for_a_warm(log_session, specs, inputs, monkeypatch):
    log_session._turns._places = 1
    gate = Gate(monkeypatch)
    score = Call(lambda: log_session.score(Request(inputs, "bob", "v1")))
    assert gate.reached.wait(60)
    with one_line(DeadlineError, "deadline"):
        log_session.warm("ann", inputs, "v1", deadline=0.05)
    warm = Call(lambda: log_session.warm("ann", inputs, "v1"))
    time.sleep(0.05)
    assert gate.runs == 1, "the only place is the score's"
    gate.opened.set()
    score.done()
    assert warm.done() is True
    gate.opened.clear(), gate.reached.clear()
    warm = Call(lambda: log_session.warm("cid", inputs, "v1"))
    assert gate.reached.wait(60)
    assert len(log_session.score(Request(part(specs, inputs, "request", "target"), "ann", "v1"))) == 4
    gate.opened.set()
    assert warm.done() is True


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_passed_deadline_begins_nothing(log_session, inputs):
    for deadline in (0, -1.5, Deadline(0)):
        with one_line(DeadlineError, "deadline passed"):
            log_session.score(Request(inputs, "ann", "v1"), deadline=deadline)
        with one_line(DeadlineError):
            log_session.warm("ann", inputs, "v1", deadline=deadline)
    assert (log_session.stats().users, *told(log_session)) == (0, 0, 0, 0)
    assert len(log_session.score(Request(inputs, "ann", "v1"), deadline=60)) == 4
    assert len(log_session.score(Request(inputs, "ann", "v1"), deadline=float("inf"))) == 4


@pytest.mark.parametrize("wrong", [float("nan"), "1", True, [1], 1j], ids=repr)
def test_a_deadline_that_is_none_is_named(log_session, inputs, wrong):
    for call in (lambda: log_session.score(Request(inputs), deadline=wrong), lambda: Deadline(wrong)):
        with one_line(UsageError, "deadline"):
            call()


def test_between_stages_a_call_that_is_not_wanted_ends_and_its_state_is_kept(log_session, specs, inputs, monkeypatch):
    gate, deadline = Gate(monkeypatch), Deadline(600)
    score = Call(lambda: log_session.score(Request(inputs, "ann", "v1"), deadline=deadline))
    assert gate.reached.wait(60)
    deadline.cancel()
    gate.opened.set()
    score.done()
    assert isinstance(score.error, CancelledError)
    assert score.error.code == "cancelled"
    rest = part(specs, inputs, "request", "target")
    assert log_session.answer(Request(rest, "ann", "v1")).hits == (True,)


def test_between_runs_too(log_session, specs, monkeypatch):
    monkeypatch.setattr("stca.runtime.model._TOKENS_TOGETHER", 1)
    requests = [probe.single(specs, 5, 2, np.random.default_rng(i)) for i in range(3)]
    deadline, encode, runs = Deadline(600), Model._encode, []

    def counted(model, users, tokens):
        runs.append(len(users))
        deadline.cancel()
        return encode(model, users, tokens)

    monkeypatch.setattr(Model, "_encode", counted)
    with one_line(CancelledError):
        log_session.score(RequestBatch(probe.pack(specs, requests), ["a", "b", "c"], ["v"] * 3), deadline=deadline)
    assert runs == [1]


@pytest.mark.parametrize("cancelled", [True, False])
def test_whoever_waits_for_anothers_encoding_waits_no_longer_than_wanted(log_session, inputs, monkeypatch, cancelled):
    gate = Gate(monkeypatch)
    first = Call(lambda: log_session.score(Request(inputs, "ann", "v1")))
    assert gate.reached.wait(60)
    deadline = Deadline(None if cancelled else 0.05)
    second = Call(lambda: log_session.score(Request(inputs, "ann", "v1"), deadline=deadline))
    if cancelled:
        time.sleep(0.05)
        deadline.cancel()
    second.done()
    assert isinstance(second.error, CancelledError if cancelled else DeadlineError)
    gate.opened.set()
    assert len(first.done()) == 4
    assert gate.runs == 1


def test_each_end_has_its_code():
    assert (DeadlineError.code, CancelledError.code) == ("deadline", "cancelled")


def test_no_deadline_cannot_be_cancelled():
    Deadline.of(None).cancel()
    Deadline.of(None).check()
