"""Corrected events in a kept state: the scores are those of the corrected history, and nobody sees half of it."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny
from support.errors import one_line

from stca import probe
from stca.errors import HistoryNeededError, RequestError
from stca.runtime import Request, Session

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=[("log", "projected"), ("log", "absorbed")], ids="-".join)
def session(request, exported):
    return Session.load(exported(*request.param), threads=1, truncate=True)


def ask(session, tokens, seed=0):
    return probe.single(session.manifest.graphs["request"].inputs, tokens, 4, np.random.default_rng(seed))


def parts(session, inputs):
    """What a token has, and what comes with each request."""
    specs = {s.name: s for s in session.manifest.graphs["request"].inputs}
    tokens = {n: x for n, x in inputs.items() if specs[n].scope == "user" and specs[n].shape[:1] == ("N_h",)}
    return tokens, {n: x for n, x in inputs.items() if specs[n].scope != "user"}


@pytest.mark.parametrize(("at", "rows"), [(0, 1), (4, 2), (-1, 1), (-9, 9), (8, 1)])
def test_amended_is_the_corrected_history(session, at, rows):
    inputs = ask(session, 9)
    old, targets = parts(session, inputs)
    late, _ = parts(session, ask(session, rows, seed=1))
    session.score(Request(inputs, user="u", version=1))
    begin = at % 9
    corrected = {n: np.concatenate([x[:begin], late[n], x[begin + rows :]]) for n, x in old.items()}
    assert session.amend("u", late, version=2, at=at, after=1)
    hits = session.stats().hits
    amended = session.score(Request(targets, user="u", version=2))
    assert session.stats().hits == hits + 1
    np.testing.assert_allclose(amended, session.score(Request({**inputs, **corrected})), **ROUNDING)
    assert not np.allclose(amended, session.score(Request(inputs)), **ROUNDING), "nothing was amended"
    assert session.append("u", {n: x[:1] for n, x in old.items()}, version=3, after=2)
    longer = {n: np.concatenate([x, old[n][:1]]) for n, x in corrected.items()}
    appended = session.score(Request(targets, user="u", version=3))
    np.testing.assert_allclose(appended, session.score(Request({**inputs, **longer})), **ROUNDING)


def test_from_the_newest_where_old_events_fell_off(session):
    limit = tiny.MAX_HISTORY
    inputs, more = ask(session, limit), ask(session, 3, seed=1)
    old, targets = parts(session, inputs)
    new, late = parts(session, more)[0], parts(session, ask(session, 1, seed=2))[0]
    session.score(Request(inputs, user="u", version=0))
    assert session.append("u", new, version=1)
    assert session.amend("u", late, version=2, at=-5)
    whole = {n: np.concatenate([x, new[n]])[-limit:] for n, x in old.items()}
    for n, x in whole.items():
        x[-5:-4] = late[n]
    amended = session.score(Request(targets, user="u", version=2))
    np.testing.assert_allclose(amended, session.score(Request({**inputs, **whole})), **ROUNDING)


def test_a_request_under_way_keeps_what_it_found(session):
    inputs = ask(session, 9)
    session.score(Request(inputs, user="u", version=0))
    held = session._store.find("u")[1]
    before = {n: x.copy() for n, x in held.tensors.items()}
    assert session.amend("u", {n: x[3:5] for n, x in parts(session, inputs)[0].items()}, version=1, at=0)
    assert all(np.array_equal(x, before[n]) for n, x in held.tensors.items())


def test_the_version_of_the_history_before_names_no_changed_one(session):
    inputs = ask(session, 9)
    two = {n: x[:2] for n, x in parts(session, inputs)[0].items()}
    session.score(Request(inputs, user="u", version=1))
    for change in (session.append, lambda *of, **more: session.amend(*of, at=0, **more)):
        with one_line(RequestError, "version: is 1, that of the history before; name the changed one anew"):
            change("u", two, 1, after=1)
    assert session.stats().appends == 0


def test_nothing_is_encoded_for_a_place_that_is_none(session, monkeypatch):
    inputs = ask(session, 9)
    two = {n: x[:2] for n, x in parts(session, inputs)[0].items()}
    for at in ("x", 1.5, None, True):
        with one_line(RequestError, "at:", "whole number"):
            session.amend("nobody", two, "v2", at=at)
    session.score(Request(inputs, user="u", version=1))
    monkeypatch.setattr(type(session._model.encoder), "run", lambda *_: pytest.fail("encoded"))
    for at in (8, -10):
        with one_line(RequestError, f"at: is {at};", "has 9 events", "all 2 from there on"):
            session.amend("u", two, version=2, at=at)


def test_corrected_events_are_never_cut(session):
    limit = tiny.MAX_HISTORY
    inputs, more = ask(session, limit), ask(session, limit + 1, seed=1)
    targets = parts(session, inputs)[1]
    before = session.score(Request(inputs, user="u", version=1))
    for at in (0, -limit, -limit - 1):
        with one_line(RequestError, f"at: is {at};", f"has {limit} events", f"all {limit + 1} from there on"):
            session.amend("u", parts(session, more)[0], version=2, at=at)
    np.testing.assert_array_equal(session.score(Request(targets, user="u", version=1)), before)


def test_what_cannot_be_amended(session):
    inputs = ask(session, 9)
    tokens, targets = parts(session, inputs)
    two = {n: x[:2] for n, x in tokens.items()}
    assert not session.amend("u", two, version=1, at=0), "there is no state to amend"
    session.score(Request(inputs, user="u", version=0))
    for at in (8, 9, -1, -10):
        with one_line(RequestError, f"at: is {at};", "has 9 events", "all 2 from there on"):
            session.amend("u", two, version=1, at=at)
    for at in (1.5, "0", None, True):
        with one_line(RequestError, "at:", "whole number"):
            session.amend("u", two, version=1, at=at)
    for given, name in (({**two, **targets}, "is no part of an event"), ({**two, "user_segment": [1]}, "user_segment")):
        with one_line(RequestError, name, "amend takes"):
            session.amend("u", given, version=1, at=0)
    with one_line(RequestError, "user: is None; events are amended"):
        session.amend(None, two, version=1, at=0)
    assert not session.amend("u", two, version=1, at=0, after=7), "another version is kept"
    assert session.amend("u", two, version=1, at=0, after=0)
    assert session.amend("u", two, version=1, at=0, after=0), "the same call again"
    with pytest.raises(HistoryNeededError):
        session.score(Request(targets, user="u", version=0))
