"""Neighbours' histories are read behind the user's own: scores are those of the model on all of them as one history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.errors import one_line

from stca import probe
from stca.checks.verify import prove
from stca.errors import HistoryNeededError, RequestError
from stca.export.pipeline import export_module
from stca.export.to_onnx import RequestModel
from stca.runtime import Request, RequestBatch, Session
from stca.specs import OFFSETS, TARGETS, TOKENS, TensorSpec

# A bundle whose states hold a sum over all events.
SUMS = Path(__file__).parents[1] / "runtime_cpp" / "golden" / "sums"
ROUNDING = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(params=("log", "delta"))
def session(request, exported):
    return Session.load(exported(request.param, "projected"), threads=1)


def ask(session, tokens, seed):
    return probe.single(session.manifest.graphs["request"].inputs, tokens, 4, np.random.default_rng(seed))


def parts(session, *tokens):
    """Each user's inputs; and what the first asks, and the histories of all as one."""
    asked = [ask(session, n, seed) for seed, n in enumerate(tokens)]
    users = [{n: x for n, x in one.items() if n.startswith(("history_", "user_"))} for one in asked]
    targets = {n: x for n, x in asked[0].items() if n not in users[0]}
    events = [n for n in users[0] if n.startswith("history_")]
    return users, targets, {**users[0], **{n: np.concatenate([u[n] for u in users]) for n in events}}


def test_histories_one_behind_the_other_are_one_history(session):
    (own, *others), targets, whole = parts(session, 5, 3, 7)
    expected = session.score(Request({**whole, **targets}))
    neighbours = [Request(one, f"n{i}", 1) for i, one in enumerate(others)]
    made = session.answer(Request({**own, **targets}, "ann", 1, neighbours))
    np.testing.assert_allclose(made.scores, expected, **ROUNDING)
    assert (made.hits, made.neighbours) == ((False,), (("miss", "miss"),))
    kept = session.answer(Request(targets, "ann", 1, [Request({}, "n0", 1), Request({}, "n1", 1)]))
    np.testing.assert_allclose(kept.scores, expected, **ROUNDING)
    assert (kept.hits, kept.neighbours) == ((True,), (("hit", "hit"),))
    assert kept.copied > session.stats().state_bytes * 0.9  # each state once, but for what is the user's alone
    alone = session.score(Request({**own, **targets}))
    np.testing.assert_allclose(session.score(Request(targets, "ann", 1)), alone, **ROUNDING)  # the own is as it was
    assert not np.allclose(alone, expected, atol=1e-4)


def test_a_state_that_is_nowhere(session):
    (own, other), targets, whole = parts(session, 5, 3)
    alone = session.score(Request({**own, **targets}, "ann", 1))
    with pytest.raises(HistoryNeededError, match="user 'bob': no state of version 1 is kept"):
        session.score(Request(targets, "ann", 1, [Request({}, "bob", 1)]))
    without = session.answer(Request(targets, "ann", 1, [Request({}, "bob", 1)], leave_out=True))
    assert (without.neighbours, without.copied) == ((("left_out",),), 0)
    np.testing.assert_array_equal(without.scores, alone)
    session.warm("bob", other, 1)
    both = session.answer(Request(targets, "ann", 1, [Request({}, "bob", 1)], leave_out=True))
    assert both.neighbours == (("hit",),)
    np.testing.assert_allclose(both.scores, session.score(Request({**whole, **targets})), **ROUNDING)
    with pytest.raises(HistoryNeededError, match="user 'ann'"):  # the user themselves is never left out
        session.score(Request(targets, "ann", 2, [Request({}, "bob", 1)], leave_out=True))


def test_requests_computed_together(exported):
    with Session.load(exported("log", "projected"), threads=1, batch_seconds=0.0) as session:
        (own, other), targets, whole = parts(session, 5, 3)
        found = session.answer(Request({**own, **targets}, "ann", 1, [Request(other, "bob", 1)]))
        np.testing.assert_allclose(found.scores, session.score(Request({**whole, **targets})), **ROUNDING)
        assert found.neighbours == (("miss",),)


def test_what_no_neighbour_is(session):
    (own, other), targets, _ = parts(session, 5, 3)

    def refused(told, neighbours):
        with one_line(RequestError, told):
            session.score(Request({**own, **targets}, "ann", 1, neighbours))

    items = {"target_item": targets["target_item"]}
    refused("target_item is the request's or its targets' own", [Request({**other, **items}, "bob", 1)])
    refused("names no neighbours itself", [Request(other, "bob", 1, [Request({}, "cid", 1)])])
    refused("each is a Request", ["bob"])
    for wrong, kind in (
        (5, "int"),
        (Request(other, "bob", 1), "Request"),
        (np.arange(3), "ndarray"),
        (None, "NoneType"),
    ):
        refused(f"neighbours: is {kind}, expected a list of Requests", wrong)
        refused(f"neighbours: is {kind}, expected a list of Requests", [Request(other, "bob", 1, wrong)])
    session.warm("ann", own, 1)
    for wrong in (1, "no", np.arange(3)):
        with one_line(RequestError, "leave_out: is", "expected True or False"):
            session.score(Request(targets, "ann", 1, (), wrong))
    session.warm("bob", other, 1)
    refused("'history_itme': the model has no such input", [Request({"history_itme": [1]}, "bob", 1)])
    with Session.load(SUMS, threads=1) as sums, one_line(RequestError, "states are not read one behind the other"):
        history = {"clicks": [1], "recent": [1, 2]}
        asked = {**history, "hour": [3], "candidates": np.float32([1])}
        sums.score(Request(asked, "ann", 1, [Request(history, "bob", 1)]))


class Similar(torch.nn.Module):
    """A bias for each token, which is the request's own."""

    def __init__(self) -> None:
        super().__init__()
        self.events, self.items = torch.nn.Embedding(50, 8), torch.nn.Embedding(50, 8)

    def forward(self, inputs):
        key, history = self.events(inputs["events"]), inputs["history_offsets"]
        key = torch.cat([key, inputs["similarity"][:, None]], dim=1)[:, None]
        query = self.items(inputs["items"])
        query = torch.cat([query, torch.ones_like(query[:, :1])], dim=1)[:, None]
        lengths = history[1:] - history[:-1]
        attend = torch.ops.stca.target_history_attention
        return attend(query, key, key, inputs["target_offsets"], history, lengths, 1.0)[:, 0, :2]


@pytest.fixture(scope="module")
def similar(tmp_path_factory):
    torch.manual_seed(0)
    inputs = (
        TensorSpec("events", "int64", (TOKENS,), "user", 50),
        TensorSpec("history_offsets", "int32", (OFFSETS,), "user"),
        TensorSpec("similarity", "float32", (TOKENS,), "request"),
        TensorSpec("items", "int64", (TARGETS,), "target", 50),
        TensorSpec("target_offsets", "int32", (OFFSETS,), "target"),
    )
    folder = tmp_path_factory.mktemp("similar") / "bundle"
    source = {"kind": "callable", "name": "similar"}
    return export_module(RequestModel(Similar(), inputs), folder, prove=prove, source=source).path


def test_how_similar_a_neighbour_is(similar):
    session = Session.load(similar, threads=1)
    items, own, other = np.array([3, 4]), np.arange(5), np.arange(20, 23)
    similarity = np.array([1.0] * 5 + [0.25] * 3, np.float32)
    whole = {"events": np.concatenate([own, other]), "similarity": similarity, "items": items}
    expected = session.score(Request(whole))
    neighbour = Request({"events": other, "similarity": 0.25}, "bob", 1)
    found = session.score(Request({"events": own, "similarity": 1.0, "items": items}, "ann", 1, [neighbour]))
    np.testing.assert_allclose(found, expected, **ROUNDING)
    rows = Request({"similarity": similarity[5:]}, "bob", 1)
    np.testing.assert_array_equal(
        session.score(Request({"similarity": similarity[:5], "items": items}, "ann", 1, [rows])), found
    )
    batch = RequestBatch(
        {**whole, "history_offsets": [0, 8], "target_offsets": [0, 2]}  # whose rows are all there
    )
    np.testing.assert_array_equal(session.score(batch), expected)
    for wrong, told in (
        ({"similarity": similarity[:2]}, "similarity: has 2 rows for a history of 3 tokens"),
        ({}, "neighbours: similarity is missing"),
        ({"similarity": float("nan")}, "similarity: holds nan"),
    ):
        request = Request({"similarity": 1.0, "items": items}, "ann", 1, [Request(wrong, "bob", 1)])
        with one_line(RequestError, told):
            session.score(request)


def test_more_together_than_the_bundle_takes(similar):
    session = Session.load(similar, threads=1)
    object.__setattr__(session._model, "window", 7)
    asked = {"events": np.arange(5), "similarity": 1.0, "items": np.array([3])}
    neighbour = Request({"events": np.arange(3), "similarity": 1.0}, "bob", 1)
    with pytest.raises(RequestError, match="the histories have 8 tokens together, the limit is 7"):
        session.score(Request(asked, "ann", 1, [neighbour]))
