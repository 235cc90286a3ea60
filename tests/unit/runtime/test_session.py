"""The front: whatever was kept, appended, evicted or swapped, scores are those of the model on the whole history."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import tiny
from support.errors import one_line

from stca import probe
from stca.bundle import Bundle, seal
from stca.errors import BuildError, BundleError, CancelledError, HistoryNeededError, RequestError
from stca.export.pipeline import export_module
from stca.export.reference.module import request_inputs
from stca.export.to_onnx import RequestModel
from stca.manifest import WEIGHTS, EngineEntry
from stca.runtime import Deadline, OnnxRuntimeEngine, Request, RequestBatch, Residence, Session
from stca.runtime.model import Model
from stca.runtime.state import cost_of
from stca.runtime.swap import check_swap
from stca.specs import HALVES

FORMS = (("log", "absorbed"), ("log", "projected"), ("delta", "projected"))
HISTORY = ("history_item", "history_action", "history_category", "history_time", "history_gap")
# Rounding of one float32 model in two orders of summation.
ROUNDING = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(params=FORMS, ids="-".join)
def session(request, exported):
    return Session.load(exported(*request.param), threads=1)


def ask(session, tokens=9, targets=4, seed=0):
    return probe.single(session.manifest.graphs["request"].inputs, tokens, targets, np.random.default_rng(seed))


def events(inputs, rows):
    return {n: inputs[n][rows] for n in HISTORY}


def without_user(inputs):
    return {n: x for n, x in inputs.items() if not n.startswith(("history_", "user_"))}


def user_only(inputs):
    return {n: x for n, x in inputs.items() if n not in without_user(inputs)}


def counts(session):
    s = session.stats()
    return s.hits, s.misses


def packed(session, requests):
    return probe.pack(session.manifest.graphs["request"].inputs, requests)


# --- hits and misses --------------------------------------------------------------------------------------------------


def test_what_most_requests_are_is_answered_at_once(session):
    inputs = ask(session)
    rest = without_user(inputs)
    session.score(Request(inputs, "ann", 1))

    def at_once(inputs, user="ann", version=1):
        return session._scoring.at_once(session._model, Request(inputs, user, version), 0.0)

    answered = at_once(rest)
    assert answered.hits == (True,)
    assert answered.seconds.keys() == {"check", "encode", "score"}
    assert counts(session) == (1, 1)
    lists = {n: x.tolist() for n, x in rest.items()}
    np.testing.assert_array_equal(answered.scores, session.score(Request(lists, "ann", 1)))
    np.testing.assert_array_equal(answered.scores, session.score(Request(rest, "ann", 1)))
    ids = next(n for n, x in rest.items() if n.startswith("target_") and x.dtype.kind == "i")
    for others in (
        lists,
        inputs,
        {**rest, ids: rest[ids].astype(np.int32)},
        {**rest, ids: rest[ids][:-1]},
        {**rest, ids: -1 - rest[ids]},
        {**rest, ids: rest[ids][:, None]},
        {n: x[:0] if n.startswith("target_") else x for n, x in rest.items()},
        {n: x for n, x in rest.items() if n != ids},
        {"x" if n == ids else n: x for n, x in rest.items()},
        {1 if n == ids else n: x for n, x in rest.items()},
        None,
    ):
        assert at_once(others) is None
    for user, version in ((None, None), ("ann", None), ("ann", 2), ("bob", 1), (True, 1), ("ann", 1.0), ([], 1)):
        assert at_once(rest, user, version) is None
    assert counts(session) == (3, 1)


@pytest.mark.parametrize("by", ["request", "append"])
def test_a_slow_request_does_not_replace_what_a_later_call_made(session, monkeypatch, by):
    old, new = ask(session, 5), ask(session, 6)
    if by == "append":
        if not session.manifest.appendable:
            pytest.skip("its states are not appended to")
        session.score(Request(new, "ann", 0))
    encode, began, go = Model.encode, threading.Event(), threading.Event()

    def slow(model, users, *more):
        if not began.is_set():
            began.set()
            assert go.wait(60)
        return encode(model, users, *more)

    monkeypatch.setattr(Model, "encode", slow)
    found = []
    thread = threading.Thread(target=lambda: found.append(session.score(Request(old, "ann", 1))))
    thread.start()
    assert began.wait(60)
    if by == "append":
        assert session.append("ann", events(new, slice(0, 1)), 2, after=0)
    else:
        session.score(Request(new, "ann", 2))
    go.set()
    thread.join()
    assert session.answer(Request(without_user(new), "ann", 2)).hits == (True,), "the slow one took its place"
    np.testing.assert_allclose(found[0], session.score(Request(old)), rtol=0, atol=2e-6)


def test_scores_are_the_models(session, checkpoint_file):
    from stca.export.reference.checkpoint import load_checkpoint

    time = "delta" if "request_time" in {s.name for s in session.manifest.graphs["request"].inputs} else "log"
    module = load_checkpoint(checkpoint_file(time)).build().double()
    for tokens, targets in ((9, 4), (0, 3), (1, 1), (tiny.MAX_HISTORY, 50)):
        inputs = ask(session, tokens, targets)
        with torch.no_grad():
            feeds = packed(session, [inputs])
            expected = module({n: torch.from_numpy(x) for n, x in feeds.items()}).numpy()
        np.testing.assert_allclose(session.score(Request(inputs)), expected, **ROUNDING)


@pytest.mark.parametrize("version", [None, "v1"])
def test_a_hit_is_its_miss_bit_for_bit(session, version):
    inputs = ask(session)
    request = Request(inputs, user="u", version=version)
    miss = session.score(request)
    assert counts(session) == (0, 1)
    for targets in (1, 4, 17):
        other = {**ask(session, targets=targets, seed=targets), **{n: inputs[n] for n in (*HISTORY, "user_segment")}}
        hit = session.score(Request(other, user="u", version=version))
        assert np.array_equal(hit, session.score(Request(other)))
    assert np.array_equal(session.score(request), miss)
    assert counts(session) == (4, 1)


def test_a_hit_needs_no_user_inputs_when_the_version_is_known(session):
    inputs = ask(session)
    expected = session.score(Request(inputs, user="u", version=7))
    assert np.array_equal(session.score(Request(without_user(inputs), user="u", version=7)), expected)
    with one_line(HistoryNeededError, "'u'", "8", "send the user inputs"):
        session.score(Request(without_user(inputs), user="u", version=8))
    with one_line(HistoryNeededError, "'v'", "7"):
        session.score(Request(without_user(inputs), user="v", version=7))
    with one_line(RequestError, "history_item", "missing"):
        session.score(Request(without_user(inputs), user="u"))


def test_without_a_user_nothing_is_kept(session):
    session.score(Request(ask(session)))
    assert (session.stats().users, session.stats().bytes, counts(session)) == (0, 0, (0, 0))


def test_a_changed_history_is_another_version(session):
    inputs = ask(session)
    session.score(Request(inputs, user="u"))
    for name in (*HISTORY, "user_segment"):
        changed = {**inputs, name: (inputs[name] + 1) % 3}
        assert np.array_equal(session.score(Request(changed, user="u")), session.score(Request(changed))), name
    assert counts(session)[0] == 0
    assert session.stats().users == 1


def test_what_belongs_to_the_request_is_not_kept(session):
    inputs = ask(session)
    session.score(Request(inputs, user="u", version=1))
    changed = {**inputs, "request_device": (inputs["request_device"] + 1) % 3}
    if "request_time" in inputs:
        changed["request_time"] = inputs["request_time"] + 10**6
    hit = session.score(Request(changed, user="u", version=1))
    assert counts(session) == (1, 1)
    assert np.array_equal(hit, session.score(Request(changed)))
    assert not np.array_equal(hit, session.score(Request(inputs)))


def test_the_caller_may_reuse_its_arrays(session):
    inputs = ask(session)
    expected = session.score(Request(inputs, user="u", version=1))
    again = {n: x.copy() for n, x in inputs.items()}
    for x in inputs.values():
        x[:] = 0
    scores = session.score(Request(without_user(again), user="u", version=1))
    assert np.array_equal(scores, expected)
    scores[:] = 0
    assert np.array_equal(session.score(Request(without_user(again), user="u", version=1)), expected)


@pytest.mark.parametrize("targets", [0, 1])
def test_few_targets_and_no_history(session, targets):
    inputs = ask(session, tokens=0, targets=targets)
    for _ in range(2):
        scores = session.score(Request(inputs, user="u"))
        assert scores.shape == (targets, 2)
        assert np.isfinite(scores).all()
    assert counts(session) == ((1, 1) if targets else (0, 0)), "for no targets nobody is encoded"


# --- batches ----------------------------------------------------------------------------------------------------------

SIZES = ((9, 4), (0, 2), (5, 0), (tiny.MAX_HISTORY, 3), (1, 1))


def test_a_batch_is_its_requests_within_rounding(session):
    requests = [ask(session, n, m, i) for i, (n, m) in enumerate(SIZES)]
    expected = np.concatenate([session.score(Request(r)) for r in requests])
    got = session.score(RequestBatch(packed(session, requests)))
    np.testing.assert_allclose(got, expected, **ROUNDING)
    one = session.score(RequestBatch(packed(session, requests[:1])))
    assert np.array_equal(one, session.score(Request(requests[0])))


def test_users_of_a_batch_hit_and_miss_side_by_side(session):
    requests = [ask(session, n, m, i) for i, (n, m) in enumerate(SIZES)]
    batch = packed(session, requests)
    expected = session.score(RequestBatch(batch))
    session.score(Request(requests[1], user=1))
    session.score(Request(requests[3], user=3))
    mixed = session.score(RequestBatch(batch, users=[0, 1, None, 3, 4]))
    assert counts(session) == (2, 4)
    np.testing.assert_allclose(mixed, expected, **ROUNDING)
    np.testing.assert_allclose(session.score(RequestBatch(batch, users=[0, 1, None, 3, 4])), expected, **ROUNDING)
    assert counts(session) == (6, 4)


def test_one_user_twice_in_a_batch(session):
    """With one history, and with two that cannot both be kept."""
    a, b = ask(session, 5, 2, 1), ask(session, 7, 3, 2)
    for requests in ([a, a], [a, b], [b, a]):
        expected = session.score(RequestBatch(packed(session, requests)))
        got = session.score(RequestBatch(packed(session, requests), users=["u", "u"]))
        np.testing.assert_allclose(got, expected, **ROUNDING)
    assert session.stats().users == 1


@pytest.fixture
def encoded(session, monkeypatch):
    """The history tokens of each user in each run of the user encoder."""
    encoder, run, runs = session._model.encoder, OnnxRuntimeEngine.run, []

    def watched(self, inputs):
        if self is encoder:
            runs.append(np.diff(inputs["history_offsets"]).tolist())
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", watched)
    return runs


def test_misses_of_a_batch_are_encoded_together(session, encoded):
    requests = [ask(session, n, m, i) for i, (n, m) in enumerate(SIZES)]
    requests += requests[:1]
    users = [0, 1, None, 3, 4, 0]
    session.score(Request(requests[3], user=3))
    scores = session.score(RequestBatch(packed(session, requests), users=users))
    assert encoded == [[tiny.MAX_HISTORY], [9, 0, 5, 1]], "a hit is not encoded, a user with two requests once"
    assert counts(session) == (2, 4)
    for user in (0, 1, 4):  # what is kept is a state of this user alone, as if encoded alone
        session.score(Request(requests[user], user="alone"))
        mine, alone = kept(session, user), kept(session, "alone")
        assert mine.keys() == alone.keys()
        for name, x in alone.items():
            assert (mine[name].shape, mine[name].dtype) == (x.shape, x.dtype)
            np.testing.assert_allclose(mine[name], x, rtol=0, atol=4e-6)
            assert not isinstance(mine[name].base, np.ndarray), "a view would keep the batch's tensors alive"
            assert x.flags.owndata, "ONNX Runtime would keep its memory when the state is gone"
    again = session.score(RequestBatch(packed(session, requests), users=users))
    np.testing.assert_allclose(again, scores, **ROUNDING)
    assert session.append(4, events(requests[0], slice(0, 2)), version="longer")


def test_long_histories_are_encoded_alone(session, encoded, monkeypatch):
    monkeypatch.setattr("stca.runtime.model._TOKENS_TOGETHER", 14)
    sizes = (9, 5, 1, 15, 0, 14, 2, 12)
    requests = [ask(session, n, 2, i) for i, n in enumerate(sizes)]
    got = session.score(RequestBatch(packed(session, requests)))
    assert encoded == [[9, 5], [1], [15], [0, 14], [2, 12]]
    np.testing.assert_allclose(got, np.concatenate([session.score(Request(r)) for r in requests]), **ROUNDING)


def test_states_of_the_runs_before_a_deadline_are_kept(session, monkeypatch):
    monkeypatch.setattr("stca.runtime.model._TOKENS_TOGETHER", 14)
    requests = [ask(session, n, 2, i) for i, n in enumerate((9, 5, 12, 3))]
    deadline, run = Deadline(None), OnnxRuntimeEngine.run

    def cancelled(self, inputs):
        deadline.cancel()
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", cancelled)
    batch = RequestBatch(packed(session, requests), users=list("abcd"), versions=[1] * 4)
    with pytest.raises(CancelledError):
        session.score(batch, deadline=deadline)
    again = [session.answer(Request(r, user=u, version=1)).hits for u, r in zip("abcd", requests, strict=True)]
    assert again == [(True,), (True,), (False,), (False,)]


@pytest.mark.parametrize(("most", "runs"), [(1, [[9], [5], [1], [0]]), (3, [[9, 5, 1], [0]]), (None, [[9, 5, 1, 0]])])
def test_an_engine_gets_no_more_requests_than_it_serves(session, encoded, most, runs):
    model = session._model
    entry = EngineEntry(graph="", file="", flavour="onnxruntime", precision="fp32", requests=most)
    choice = dataclasses.replace(model.choice, entries=dict.fromkeys(HALVES, entry))
    session._model = dataclasses.replace(model, choice=choice)
    requests = [ask(session, n, 2, i) for i, n in enumerate((9, 5, 1, 0))]
    got = session.score(RequestBatch(packed(session, requests)))
    assert encoded == runs
    np.testing.assert_allclose(got, np.concatenate([session.score(Request(r)) for r in requests]), **ROUNDING)


def test_states_that_cannot_be_parted_are_made_one_by_one(session, encoded):
    """A tensor with neither a row for each token nor one for each user does not say whose its rows are."""
    model = session._model
    whole = [dataclasses.replace(s, shape=("rows", *s.shape[1:])) for s in model.manifest.state if s.input is None]
    manifest = dataclasses.replace(model.manifest, state=tuple(whole))
    session._model = dataclasses.replace(model, manifest=manifest)
    list(session._model.encode([session._model.door.admit(user_only(ask(session, n, 2, n)), "user") for n in (3, 2)]))
    assert encoded == [[3], [2]]


def test_a_batch_of_none(session):
    batch = packed(session, [ask(session, 0, 0)])
    none = {n: x[:1] if n.endswith("offsets") else x[:0] for n, x in batch.items()}
    scores = session.score(RequestBatch(none))
    assert (scores.shape, scores.dtype) == ((0, 2), np.float32)


# --- append -----------------------------------------------------------------------------------------------------------


def kept(session, user):
    """The kept state's tensors."""
    return session._store.find(user)[1].tensors


@pytest.mark.parametrize("cuts", [(5, 9), (0, 9), (1, 2, 3, 9), (9, 9), (4, 4, 9)], ids=str)
def test_appended_is_encoded_at_once(session, cuts):
    """Each token is encoded on its own, so only a matrix product's order of summation can differ: a few ulp."""
    inputs = ask(session)
    whole = session.score(Request(inputs))
    session.score(Request({**inputs, **events(inputs, slice(0, cuts[0]))}, user="u", version=cuts[0]))
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        assert session.append("u", events(inputs, slice(a, b)), version=(b, i))
    hits, misses = counts(session)
    appended = session.score(Request(without_user(inputs), user="u", version=(cuts[-1], len(cuts) - 2)))
    assert counts(session) == (hits + 1, misses)
    np.testing.assert_allclose(appended, whole, **ROUNDING)
    session.score(Request(inputs, user="whole"))
    for name, x in kept(session, "whole").items():
        mine = kept(session, "u")[name]
        assert (mine.shape, mine.dtype) == (x.shape, x.dtype)
        np.testing.assert_allclose(mine, x, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(x).max(initial=1))


def test_the_oldest_fall_off_at_the_windows_end(session):
    """One event at a time, then several, then more than the window holds: always the most recent ones, exactly."""
    limit = tiny.MAX_HISTORY
    inputs = ask(session, tokens=limit)
    more = ask(session, tokens=limit, seed=1)
    stream = {n: np.concatenate([inputs[n], more[n]]) for n in HISTORY}
    session.score(Request({**inputs, **{n: stream[n][: limit - 1] for n in HISTORY}}, user="u", version=0))
    end = limit - 1
    for version, step in enumerate((1, 1, 5, 0, 3), start=1):
        assert session.append("u", {n: stream[n][end : end + step] for n in HISTORY}, version=version)
        end += step
        window = {n: stream[n][max(0, end - limit) : end] for n in HISTORY}
        expected = session.score(Request({**inputs, **window}))
        got = session.score(Request(without_user(inputs), user="u", version=version))
        np.testing.assert_allclose(got, expected, **ROUNDING)
    assert kept(session, "u")["state_history_offsets"].tolist() == [0, limit]
    whole = {n: more[n] for n in HISTORY}
    assert session.append("u", whole, version="all new")
    got = session.score(Request(without_user(inputs), user="u", version="all new"))
    np.testing.assert_allclose(got, session.score(Request({**inputs, **whole})), **ROUNDING)


def test_more_events_than_the_window_holds(session, bundle_dir):
    long = ask(session, tokens=tiny.MAX_HISTORY + 3)
    session.score(Request({**long, **events(long, slice(0, 4))}, user="u", version=0))
    with one_line(RequestError, "history_item", "35", "32"):
        session.append("u", events(long, slice(None)), version=1)
    cutting = Session.load(bundle_dir, threads=1, truncate=True)
    if "request_time" in long:
        return
    cutting.score(Request({**long, **events(long, slice(0, 4))}, user="u", version=0))
    assert cutting.append("u", events(long, slice(None)), version=1)
    got = cutting.score(Request(without_user(long), user="u", version=1))
    np.testing.assert_allclose(got, cutting.score(Request(long)), **ROUNDING)


def test_the_same_append_again_changes_nothing(session):
    """A caller that had no answer asks again; a version is one history."""
    inputs = ask(session)
    session.score(Request({**inputs, **events(inputs, slice(0, 7))}, user="u", version=7))
    for _ in range(2):
        assert session.append("u", events(inputs, slice(7, 9)), version=9)
    got = session.score(Request(without_user(inputs), user="u", version=9))
    np.testing.assert_allclose(got, session.score(Request(inputs)), **ROUNDING)


def test_an_append_that_does_not_follow_what_is_kept(session):
    """An event was lost on the way: 8 follows 7, but only 6 is kept."""
    inputs = ask(session)
    session.score(Request({**inputs, **events(inputs, slice(0, 6))}, user="u", version=6))
    assert not session.append("u", events(inputs, slice(7, 8)), version=8, after=7)
    assert session.append("u", events(inputs, slice(6, 7)), version=7, after=6)
    assert session.append("u", events(inputs, slice(7, 9)), version=9, after=7)
    got = session.score(Request(without_user(inputs), user="u", version=9))
    np.testing.assert_allclose(got, session.score(Request(inputs)), **ROUNDING)


def test_an_append_needs_a_version(session):
    inputs = ask(session)
    session.score(Request(inputs, user="u", version=0))
    with one_line(RequestError, "version"):
        session.append("u", events(inputs, slice(0, 1)), version=None)


def test_append_to_nothing(session):
    assert not session.append("u", events(ask(session), slice(None)), version=1)
    assert session.stats().users == 0


def test_append_wants_an_events_inputs_and_no_others(session):
    inputs = ask(session)
    session.score(Request(inputs, user="u", version=0))
    before = {n: x.copy() for n, x in kept(session, "u").items()}
    new = events(inputs, slice(0, 2))
    wrong = [
        ({n: x for n, x in new.items() if n != "history_gap"}, ("history_gap", "missing")),
        ({**new, "history_item": [1, 97]}, ("history_item", "97", "[1]", "[0, 96]")),
        ({**new, "history_time": [1]}, ("history_time", "[1]")),
        ({**new, "user_segment": [1]}, ("user_segment",)),
        ({**new, "target_item": [1]}, ("target_item",)),
        ({**new, "history_offsets": [0, 2]}, ("history_offsets",)),
        ({**new, "nonsense": [1]}, ("nonsense",)),
    ]
    for given, words in wrong:
        with one_line(RequestError, *words):
            session.append("u", given, version=1)
    assert session._store.find("u")[0].version == 0
    assert all(np.array_equal(x, kept(session, "u")[n]) for n, x in before.items())


def test_the_kept_state_stays_whole_when_appended_to(session):
    """A request that runs while another appends has the state it looked up."""
    inputs = ask(session)
    session.score(Request(inputs, user="u", version=0))
    old = kept(session, "u")
    before = {n: x.copy() for n, x in old.items()}
    session.append("u", events(inputs, slice(0, 2)), version=1)
    assert all(np.array_equal(old[n], before[n]) for n in before)


def test_a_state_that_cannot_be_appended_to(tmp_path, bundle_dir):
    shutil.copytree(bundle_dir, tmp_path / "B")
    seal(tmp_path / "B", dataclasses.replace(Bundle.load(bundle_dir).manifest, appendable=False))
    session = Session.load(tmp_path / "B", threads=1)
    inputs = ask(session)
    session.score(Request(inputs, user="u"))
    with one_line(RequestError, "cannot be appended"):
        session.append("u", events(inputs, slice(0, 1)), version=1)


def test_concurrent_appends_lose_no_event(log_session, monkeypatch):
    """Two appends to one user at once: the state that claims the later version must have both events in it."""
    session, inputs = log_session, ask(log_session)
    session.score(Request({**inputs, **events(inputs, slice(0, 7))}, user="u", version=7))
    encode, first = Model.encode, []

    def overtaken(self, arrays):
        if not first:  # while the first append encodes, a second one comes and goes
            first.append(True)
            session.append("u", events(inputs, slice(7, 8)), version=8)
        return encode(self, arrays)

    monkeypatch.setattr(Model, "encode", overtaken)
    done = session.append("u", events(inputs, slice(8, 9)), version=9)
    monkeypatch.undo()
    expected = session.score(Request(inputs))
    if done:  # or it says that it did not happen
        got = session.score(Request(without_user(inputs), user="u", version=9))
        np.testing.assert_allclose(got, expected, **ROUNDING)


def test_an_append_under_way_does_not_bring_back_a_forgotten_user(log_session, monkeypatch):
    session, inputs = log_session, ask(log_session)
    session.score(Request(inputs, user="u", version=0))
    encode = Model.encode

    def forgotten(self, arrays):
        session.forget("u")
        return encode(self, arrays)

    monkeypatch.setattr(Model, "encode", forgotten)
    session.append("u", events(inputs, slice(0, 1)), version=1)
    assert session.stats().users == 0


# --- forget and the budget --------------------------------------------------------------------------------------------


def test_forget(session):
    inputs = ask(session)
    assert not session.forget("u")
    session.score(Request(inputs, user="u", version=1))
    assert session.forget("u")
    assert not session.forget("u")
    assert (session.stats().users, session.stats().bytes) == (0, 0)
    with one_line(HistoryNeededError, "'u'"):
        session.score(Request(without_user(inputs), user="u", version=1))


def test_where_a_state_is(session):
    assert session.residence("u") is None
    session.score(Request(ask(session), user="u", version=1))
    stats = session.stats()
    assert session.residence("u") == session.residence("u", 1) == Residence("memory", stats.bytes, 1)
    assert session.residence("u", 2) is None, "a request of that version would be a miss"
    assert session.stats() == stats, "to ask is no use"
    with one_line(RequestError, "version 1.5"):
        session.residence("u", 1.5)
    session.forget("u")
    assert session.residence("u", 1) is None


def state_bytes(session, tokens, version=None):
    session.score(Request(ask(session, tokens), user="u", version=version))
    size = session.stats().bytes
    session.forget("u")
    return size


def test_the_budget_is_kept_by_forgetting_the_least_recent(bundle_dir):
    size = state_bytes(Session.load(bundle_dir, threads=1), 9)
    session = Session.load(bundle_dir, threads=1, cache_bytes=3 * size)
    inputs = {u: ask(session, seed=u) for u in range(5)}
    for u in range(3):
        session.score(Request(inputs[u], user=u))
    session.score(Request(inputs[0], user=0))  # 1 is now the least recent
    session.score(Request(inputs[3], user=3))
    assert (session.stats().users, session.stats().evictions) == (3, 1)
    assert session.stats().bytes == sum(cost_of(*session._store.find(u)[:2]) for u in (0, 2, 3)) <= 3 * size
    before = counts(session)
    session.score(Request(inputs[0], user=0))
    session.score(Request(inputs[1], user=1))
    assert counts(session) == (before[0] + 1, before[1] + 1)
    assert session.stats().budget == 3 * size


def test_a_state_per_token_is_as_large_as_the_manifest_says(session):
    per_token = sum(s.bytes_per_token for s in session.manifest.state)
    assert state_bytes(session, 20) - state_bytes(session, 10) == 10 * per_token


@pytest.mark.parametrize("budget", [0, 100])
def test_over_budget_is_served_and_not_kept(bundle_dir, budget):
    session, plenty = (Session.load(bundle_dir, threads=1, cache_bytes=b) for b in (budget, 1 << 20))
    inputs = ask(session)
    for n in range(1, 4):
        assert np.array_equal(session.score(Request(inputs, user="u")), plenty.score(Request(inputs)))
        stats = session.stats()
        assert (stats.users, stats.bytes, stats.hits, stats.misses, stats.refused) == (0, 0, 0, n, n)
    assert not session.append("u", events(inputs, slice(0, 1)), version=1)


def test_a_user_who_outgrows_the_budget_is_let_go(bundle_dir):
    size = state_bytes(Session.load(bundle_dir, threads=1), 9, version=1)
    session = Session.load(bundle_dir, threads=1, cache_bytes=size)
    inputs = ask(session)
    session.score(Request(inputs, user="u", version=1))
    assert session.stats().users == 1
    assert not session.append("u", events(inputs, slice(0, 1)), version=2), "no state of version 2 is kept"
    assert (session.stats().users, session.stats().bytes, session.stats().refused) == (0, 0, 1)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refused_request_leaves_no_trace(session):
    good = ask(session)
    session.score(Request(good, user="old", version=1))
    before = session.stats()
    wrong = [{**good, "target_item": [97, 0, 0, 0]}, {**good, "history_item": good["history_item"] - 100}]
    wrong += [{**good, "request_device": 9}, {n: x for n, x in good.items() if n != "user_segment"}]
    for inputs in wrong:
        with one_line(RequestError):
            session.score(Request(inputs, user="new"))
        with one_line(RequestError):
            # The wrong request is the last one: those before it must not be kept either.
            batch = {n: np.concatenate([good[n], np.asarray(x).reshape(-1)]) for n, x in inputs.items()}
            batch |= {"history_offsets": [0, 9, 18], "target_offsets": [0, 4, 8]}
            session.score(RequestBatch(batch, users=["first", "second"]))
    after = session.stats()
    assert (after.users, after.bytes, after.evictions) == (before.users, before.bytes, before.evictions)


def test_a_history_over_the_limit(session, exported):
    long = ask(session, tokens=tiny.MAX_HISTORY + 1)
    with one_line(RequestError, "history_item", "33", "32", "truncate=True"):
        session.score(Request(long))
    form = ("delta", "projected") if "request_time" in long else ("log", "absorbed")
    cutting = Session.load(exported(*form), threads=1, truncate=True)
    recent = {n: x[1:] if n in HISTORY else x for n, x in long.items()}
    assert np.array_equal(cutting.score(Request(long)), cutting.score(Request(recent)))
    batch = RequestBatch(packed(session, [long, recent]), users=["a", "b"])
    scores = cutting.score(batch)
    assert np.array_equal(scores[:4], scores[4:])


@pytest.mark.parametrize("user", [[1], {}, np.zeros(2)], ids=repr)
def test_a_user_that_cannot_be_a_key(log_session, user):
    inputs = ask(log_session)
    calls = (
        lambda: log_session.score(Request(inputs, user=user)),
        lambda: log_session.score(Request(inputs, user="u", version=user)),
        lambda: log_session.score(RequestBatch(packed(log_session, [inputs]), users=[user])),
        lambda: log_session.append(user, events(inputs, slice(0, 1)), version=1),
        lambda: log_session.forget(user),
    )
    for call in calls:
        with one_line(RequestError, "user"):
            call()
    assert log_session.stats().users == 0


def test_bundles_that_cannot_be_loaded(tmp_path, bundle_dir, log_session):
    shutil.copytree(bundle_dir, tmp_path / "B")
    (tmp_path / "B" / WEIGHTS).write_bytes(b"x")
    inputs = ask(log_session)
    expected = log_session.score(Request(inputs, user="u"))
    for path, error in ((tmp_path / "none", BundleError), (tmp_path / "B", BundleError)):
        with one_line(error):
            Session.load(path)
        with one_line(error):
            log_session.swap(path)
    shutil.rmtree(tmp_path / "B")
    shutil.copytree(bundle_dir, tmp_path / "B")
    (tmp_path / "B" / "target_scorer.onnx").write_bytes(b"\xffgarbage")
    seal(tmp_path / "B", Bundle.load(bundle_dir).manifest)
    with one_line(BuildError, "target_scorer.onnx"):
        log_session.swap(tmp_path / "B")
    assert np.array_equal(log_session.score(Request(inputs, user="u")), expected)
    assert log_session.stats().hits == 1, "the session goes on as it was"


# --- swap -------------------------------------------------------------------------------------------------------------


def test_a_swap_to_other_weights_forgets_all_states(log_session, other_weights, bundle_dir):
    session, inputs = log_session, ask(log_session)
    before = session.score(Request(inputs, user="u", version=1))
    session.swap(other_weights)
    assert session.manifest.weights == Bundle.load(other_weights).manifest.weights
    assert (session.stats().users, session.stats().bytes) == (0, 0)
    with one_line(HistoryNeededError, "'u'"):
        session.score(Request(without_user(inputs), user="u", version=1))
    after = session.score(Request(inputs, user="u", version=1))
    assert not np.allclose(before, after, **ROUNDING)
    assert np.array_equal(after, Session.load(other_weights, threads=1).score(Request(inputs)))
    session.swap(bundle_dir)
    assert np.array_equal(session.score(Request(inputs, user="u", version=1)), before)


def test_a_swap_to_the_same_weights_keeps_them(log_session, bundle_dir, tmp_path):
    inputs = ask(log_session)
    expected = log_session.score(Request(inputs, user="u", version=1))
    shutil.copytree(bundle_dir, tmp_path / "copy")
    log_session.swap(tmp_path / "copy")
    assert np.array_equal(log_session.score(Request(without_user(inputs), user="u", version=1)), expected)
    assert counts(log_session) == (1, 1)


def test_a_swap_to_another_form_of_the_same_weights_forgets(log_session, exported):
    """Equal weights, another state format."""
    inputs = ask(log_session)
    log_session.score(Request(inputs, user="u", version=1))
    log_session.swap(exported("log", "projected"))
    assert log_session.stats().users == 0
    np.testing.assert_allclose(
        log_session.score(Request(inputs, user="u", version=1)),
        Session.load(exported("log", "absorbed"), threads=1).score(Request(inputs)),
        **ROUNDING,
    )


def test_a_swap_to_a_shorter_window_keeps_no_state_longer_than_it(log_session, bundle_dir, tmp_path):
    inputs = ask(log_session, tokens=9)
    log_session.score(Request(inputs, user="u", version=1))
    shutil.copytree(bundle_dir, tmp_path / "short")
    seal(tmp_path / "short", dataclasses.replace(Bundle.load(bundle_dir).manifest, max_history=5))
    log_session.swap(tmp_path / "short")
    with one_line(HistoryNeededError):
        log_session.score(Request(without_user(inputs), user="u", version=1))


def changed_request(manifest, name, **changes):
    """The manifest with one input or output of the request graph changed; without `changes` it is left out."""
    graph = manifest.graphs["request"]

    def edit(specs):
        kept = (dataclasses.replace(s, **changes) if s.name == name else s for s in specs)
        return tuple(s for s in kept if changes or s.name != name)

    whole = dataclasses.replace(graph, inputs=edit(graph.inputs), outputs=edit(graph.outputs))
    scorer = manifest.graphs["target_scorer"]
    scorer = dataclasses.replace(scorer, outputs=edit(scorer.outputs))
    return dataclasses.replace(manifest, graphs={**manifest.graphs, "request": whole, "target_scorer": scorer})


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("target_category", {"dtype": "int32"}, ("'target_category'", "int32 [N_t]", "int64 [N_t]")),
        ("target_category", {"shape": ("N_t", 2)}, ("'target_category'", "[N_t, 2]", "[N_t]")),
        ("target_category", {"shape": ("m",)}, ("'target_category'", "[m]", "[N_t]")),
        ("request_device", {"scope": "target"}, ("'request_device'", "scope target", "scope request")),
        ("scores", {"dtype": "float16"}, ("output", "float16 [*, 2]", "float32 [*, 2]")),
        ("scores", {"shape": ("N_t", 3)}, ("output", "float32 [*, 3]", "float32 [*, 2]")),
        ("history_item", {"limit": 10**6}, None),
    ],
    ids=str,
)
def test_a_swap_to_other_inputs_or_scores_is_refused(log_session, bundle_dir, tmp_path, name, changes, words):
    """Every client's requests would fail from then on, so it is the swap that fails."""
    inputs = ask(log_session)
    expected = log_session.score(Request(inputs, user="u", version=1))
    shutil.copytree(bundle_dir, tmp_path / "other")
    seal(tmp_path / "other", changed_request(Bundle.load(bundle_dir).manifest, name, **changes))
    if words is None:
        log_session.swap(tmp_path / "other")
    else:
        with one_line(BundleError, "other", *words):
            log_session.swap(tmp_path / "other")
    assert np.array_equal(log_session.score(Request(without_user(inputs), user="u", version=1)), expected)


def test_sizes_of_scores_may_have_other_names(log_session):
    check_swap("other", log_session.manifest, changed_request(log_session.manifest, "scores", shape=("m", 2)))


def test_a_swap_between_models_of_which_one_takes_more(exported):
    """A model with time deltas needs the request's time."""
    log, delta = exported("log", "projected"), exported("delta", "projected")
    with one_line(BundleError, "'request_time'", "int64 [B] of scope request in it", "missing there"):
        Session.load(log, threads=1).swap(delta)
    with one_line(BundleError, "'request_time'", "missing in it"):
        Session.load(delta, threads=1).swap(log)


def test_a_swap_to_another_depth_and_width(log_session, tmp_path):
    model = tiny.module(tiny.config(layers=1, width=32, heads=2, items=200, max_history=40))
    made = RequestModel(model, request_inputs(model.config))
    out = export_module(made, tmp_path / "B", prove=tiny.no_proof, source={"kind": "callable"}, max_history=40).path
    inputs = ask(log_session)
    log_session.score(Request(inputs, user="u"))
    log_session.swap(out)
    assert log_session.stats().users == 0
    assert np.array_equal(log_session.score(Request(inputs)), Session.load(out, threads=1).score(Request(inputs)))


def test_a_request_under_way_finishes_on_the_bundle_it_began_with(log_session, other_weights, monkeypatch):
    session, inputs = log_session, ask(log_session)
    expected = session.score(Request(inputs))
    encode = Model.encode

    def swapped(self, arrays, *more):
        state = list(encode(self, arrays, *more))
        monkeypatch.undo()
        session.swap(other_weights)
        return state

    monkeypatch.setattr(Model, "encode", swapped)
    assert np.array_equal(session.score(Request(inputs, user="u", version=1)), expected)
    assert session.stats().users == 0, "a state of the old weights would only be in the way"
    now = session.score(Request(inputs, user="u", version=1))
    assert np.array_equal(now, Session.load(other_weights, threads=1).score(Request(inputs)))


# --- threads ----------------------------------------------------------------------------------------------------------


def test_many_threads_on_one_session(bundle_dir, other_weights):
    """Eight threads score, append, forget and swap, with room for half the states; every score is right."""
    paths = (bundle_dir, other_weights)
    truth = [Session.load(p, threads=1) for p in paths]
    size = state_bytes(truth[0], 9)
    session = Session.load(bundle_dir, threads=1, cache_bytes=4 * size)
    asked = [ask(session, 9, 3, seed) for seed in range(8)]
    expected = [[t.score(Request(a)) for t in truth] for a in asked]
    problems = []

    def right(scores, user):
        return any(np.allclose(scores, e, **ROUNDING) for e in expected[user])

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(25):
            user = int(rng.integers(8))
            match int(rng.integers(8)):
                case 0:
                    session.forget(user)
                case 1:
                    part = {**asked[user], **events(asked[user], slice(0, 6))}
                    session.score(Request(part, user=("part", user), version=6))
                    session.append(("part", user), events(asked[user], slice(6, 9)), version=9)
                    request = Request(asked[user], user=("part", user), version=9)
                    if not right(session.score(request), user):
                        problems.append(("append", user))
                case 2:
                    session.swap(paths[seed % 2])
                case 3:
                    users = [int(u) for u in rng.integers(0, 8, 3)]
                    batch = RequestBatch(packed(session, [asked[u] for u in users]), users=users)
                    scores = np.split(session.score(batch), 3)
                    problems.extend(("batch", u) for u, s in zip(users, scores, strict=True) if not right(s, u))
                case _:
                    if not right(session.score(Request(asked[user], user=user)), user):
                        problems.append(("score", user))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not problems
    assert session.stats().bytes <= 4 * size
    assert session.stats().hits > 0
