"""A sum over a history is kept as one, so that events are added to it; what is no sum is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import tiny
from support.errors import one_line
from torch import Tensor, nn

from stca.bundle import Bundle
from stca.errors import BundleError, RequestError
from stca.export import RequestModel, TensorSpec
from stca.export.pipeline import export_module
from stca.load.clients import InProcess
from stca.load.inputs import Inputs
from stca.load.run import run
from stca.load.traffic import Arrival
from stca.manifest import Manifest
from stca.runtime import Request, RequestBatch, Session

ITEMS, WIDTH, SLOTS = 50, 16, 4
INPUTS = (
    TensorSpec("history", "int64", ("batch", "seq"), "user", ITEMS),
    TensorSpec("last", "int64", ("batch", 3), "user", ITEMS),
    TensorSpec("target", "int64", ("batch",), "target", ITEMS),
)


class Pools(nn.Module):
    """A history pooled in one of several ways, then layers over what came of it."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.item = pool, nn.Embedding(ITEMS, WIDTH)
        self.prototypes = nn.Parameter(torch.randn(SLOTS, WIDTH))
        self.k = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, history: Tensor, last: Tensor, target: Tensor) -> Tensor:
        x = torch.tanh(self.k(self.item(history)))
        if self.pool == "normalized sketch":  # over its length, which PyTorch repeats by the number of events
            x = nn.functional.normalize(x, dim=-1)
        if self.pool.endswith("sketch"):
            shares = torch.einsum("kd,bld->bkl", self.prototypes, x).softmax(dim=1)
            pooled = torch.einsum("bkl,bld->bkd", shares, x)
        elif self.pool == "average":
            pooled = x.sum(dim=1, keepdim=True) / (history >= 0).float().sum(dim=1)[:, None, None]
        elif self.pool == "attention":
            pooled = (x @ self.prototypes.T).softmax(dim=1).transpose(1, 2) @ x
        elif self.pool == "mean":
            pooled = x.mean(dim=1, keepdim=True)
        elif self.pool == "sum over its size":
            pooled = x.sum(dim=1, keepdim=True) / history.shape[1]
        else:
            pooled = x.amax(dim=1, keepdim=True)
        user = self.after(pooled).sum(dim=1) + self.item(last).sum(dim=1)
        return (user * self.item(target)).sum(dim=-1)


@pytest.fixture(scope="module")
def of_module(tmp_path_factory):
    def export(pool, max_history=None):
        out = tmp_path_factory.mktemp("pools") / "B"
        model, source = RequestModel(Pools(pool), INPUTS), {"kind": "callable"}
        return export_module(model, out, prove=tiny.no_proof, source=source, max_history=max_history)

    return export


def request(events, last=(1, 2, 3)):
    return {"history": np.arange(events) * 7 % ITEMS, "last": np.array(last)}


def new(first, end, last=(1, 2, 3)):
    return {"history": request(end)["history"][first:], "last": np.array(last)}


TARGETS = {"target": np.array([3, 9, 27])}


@pytest.fixture(scope="module")
def sketch(of_module):
    return of_module("sketch").path


@pytest.mark.parametrize(("pool", "sums"), [("sketch", 1), ("normalized sketch", 1), ("average", 2)])
def test_a_sum_is_kept_and_added_to(of_module, pool, sums):
    bundle = of_module(pool)
    assert sum(s.append == "sum" for s in bundle.manifest.state) == sums
    assert bundle.manifest.appendable
    session = Session.load(bundle.path, threads=1)
    session.score(Request({**request(20), **TARGETS}, "u", 20))
    assert session.append("u", new(20, 29), 29, after=20)
    assert session.append("u", new(29, 30), 30, after=29)
    answer = session.answer(Request(TARGETS, "u", 30))
    assert answer.hits == (True,)
    np.testing.assert_allclose(answer.scores, session.score(Request({**request(30), **TARGETS})), rtol=1e-4, atol=1e-4)


def test_what_follows_from_no_event_is_made_anew(sketch):
    session = Session.load(sketch, threads=1)
    session.score(Request({**request(20), **TARGETS}, "u", 1))
    assert session.append("u", new(20, 30, last=(7, 8, 9)), 2)
    whole = session.score(Request({**request(30, last=(7, 8, 9)), **TARGETS}))
    np.testing.assert_allclose(session.score(Request(TARGETS, "u", 2)), whole, rtol=1e-4, atol=1e-4)
    with one_line(RequestError, "last: is missing"):
        session.append("u", {"history": [1]}, 3)
    with one_line(RequestError, "target: is no part of an event; append takes the user inputs alone"):
        session.append("u", {**new(0, 1), **TARGETS}, 3)
    assert session.answer(Request(TARGETS, "u", 2)).hits == (True,), "a call that was refused changed nothing"


def test_new_events_wait_for_a_request(sketch, monkeypatch):
    """What follows from sums is computed once for all appends, by the first request."""
    session = Session.load(sketch, threads=1)
    grown = []
    grower = session._model.grower.run
    monkeypatch.setattr(session._model.grower, "run", lambda feeds: grown.append(feeds) or grower(feeds))
    session.score(Request({**request(20), **TARGETS}, "u", 20))
    events = new(20, 24)
    assert session.append("u", events, 24, after=20)
    events["history"][:] = 0  # the caller's array is the caller's
    assert session.append("u", new(24, 30, last=(7, 8, 9)), 30, after=24)
    assert (grown, session.stats().appends) == ([], 2)
    waiting = session._store.memory.find("u")[1]
    assert session.stats().room_bytes == session.stats().state_bytes + 10 * 8 + 3 * 8
    whole = session.score(Request({**request(30, last=(7, 8, 9)), **TARGETS}))
    for answer in (session.answer(Request(TARGETS, "u", 30)) for _ in range(2)):
        assert answer.hits == (True,)
        np.testing.assert_allclose(answer.scores, whole, rtol=1e-4, atol=1e-4)
        assert len(grown) == 1
    assert session._store.memory.find("u")[1].tokens == waiting.tokens == 30
    assert session.stats().appends == 2


def test_who_waits_for_no_request(sketch, tmp_path):
    """Many events; those of a state that is made ahead; and those of a state that is kept in a file."""

    def waits(session):
        return session._store.memory.find("u")[1].waiting is not None

    session = Session.load(sketch, threads=1)
    session.score(Request({**request(20), **TARGETS}, "u", 20))
    assert session.append("u", new(20, 276), 276)
    assert waits(session)
    assert session.append("u", new(276, 277), 277)
    assert not waits(session)
    assert session.append("u", new(277, 278), 278)
    assert session.warm("u", {}, 278)
    assert not waits(session)
    with Session.load(sketch, threads=1, state_folder=tmp_path / "states") as first:
        first.score(Request({**request(20), **TARGETS}, "u", 20))
        assert first.append("u", new(20, 30), 30)
        assert not waits(first)
    with Session.load(sketch, threads=1, state_folder=tmp_path / "states") as second:
        assert second.answer(Request(TARGETS, "u", 30)).hits == (True,)


def test_requests_of_a_batch_that_find_waiting_events(sketch):
    """The user's two requests and another's, the events of both are in."""
    session = Session.load(sketch, threads=1)
    for user in ("u", "v"):
        session.score(Request({**request(20), **TARGETS}, user, 20))
        assert session.append(user, new(20, 30), 30)
    whole = session.score(Request({**request(30), **TARGETS}))
    batch = {"target": np.tile(TARGETS["target"], 3), "target_offsets": np.array([0, 3, 6, 9])}
    answer = session.answer(RequestBatch(batch, ["u", "v", "u"], [30, 30, 30]))
    assert answer.hits == (True,) * 3
    np.testing.assert_allclose(answer.scores, np.tile(whole, (3, 1)), rtol=1e-4, atol=1e-4)


def test_what_would_not_fit_with_its_waiting_events_is_finished_at_once(sketch):
    session = Session.load(sketch, threads=1)
    session.score(Request({**request(20), **TARGETS}, "u", 20))
    session = Session.load(sketch, threads=1, cache_bytes=session.stats().bytes + 100)
    session.score(Request({**request(20), **TARGETS}, "u", 20))
    assert session.append("u", new(20, 30), 30)
    assert session._store.memory.find("u").state.waiting is None
    assert session.answer(Request(TARGETS, "u", 30)).hits == (True,)
    assert session.stats().refused == 0


@pytest.mark.parametrize("pool", ["attention", "mean", "sum over its size", "largest"])
def test_what_is_no_sum_is_not_appended_to(of_module, pool):
    manifest = of_module(pool).manifest
    assert not manifest.appendable
    assert all(s.append is None for s in manifest.state)


def test_a_hit_does_nothing_more_for_it(sketch):
    """What follows from a sum is made once; the scorer takes what it would take without sums."""
    manifest = Bundle.load(sketch).manifest
    (kept,) = (s.name for s in manifest.state if s.append == "sum")
    assert kept not in {s.name for s in manifest.graphs["target_scorer"].inputs}
    assert manifest.split["recomputed_work"] < manifest.split["user_work"] / 100


def test_nothing_is_added_beyond_the_longest_history(of_module):
    """The oldest events would have to leave the sum."""
    session = Session.load(of_module("sketch", max_history=32).path, threads=1)
    session.score(Request({**request(30), **TARGETS}, "u", 30))
    assert session.append("u", new(30, 32), 32)
    assert not session.append("u", new(32, 33), 33)
    assert session.answer(Request(TARGETS, "u", 32)).hits == (True,), "the old state is still there"


def test_a_sum_is_not_amended(sketch):
    session = Session.load(sketch, threads=1)
    with one_line(RequestError, "amend: this bundle's states are sums over all events"):
        session.amend("u", new(19, 20), 2, at=-1)


def test_generated_traffic_appends_to_sums(sketch):
    """Of the inputs with an entry per event it sends the new events alone, and the others whole."""
    session = Session.load(sketch, threads=1)
    inputs = Inputs(session.manifest, 30, 0)
    session.score(Request({**inputs.user(7, 20), **TARGETS}, "u", 20))
    assert session.append("u", inputs.events(7, 30, 10), 30, after=20)
    whole = session.score(Request({**inputs.user(7, 30), **TARGETS}))
    np.testing.assert_allclose(session.score(Request(TARGETS, "u", 30)), whole, rtol=1e-4, atol=1e-4)


def grower(manifest):
    return manifest["graphs"]["user_grower"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m["graphs"].pop("user_grower"), ("user_grower takes 0 sums, the state has 1",)),
        (lambda m: grower(m)["inputs"][-1].update(shape=[1, 3, WIDTH]), ("kept_", "[1, 3, 16]")),
        (lambda m: grower(m)["inputs"][0].update(name="other"), ("'other' is no user input",)),
        (lambda m: grower(m)["outputs"].reverse(), ("outputs are not those of the user encoder",)),
        (lambda m: m.update(appendable=False), ("is a sum over tokens", "not appended to")),
    ],
)
def test_a_grower_that_does_not_fit_is_refused(sketch, spoil, words):
    manifest = json.loads((sketch / "manifest.json").read_text())
    spoil(manifest)
    with one_line(BundleError, *words):
        Manifest.from_json(json.dumps(manifest))


class Factors(nn.Module):
    """Users and items by their ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(20, 4), nn.Embedding(30, 4)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


def test_a_model_without_a_history_says_so(tmp_path):
    user, item = (TensorSpec(n, "int64", ("batch",), s) for n, s in (("user", "user"), ("item", "target")))
    model = RequestModel(Factors().eval(), (user, item))
    found = export_module(model, tmp_path / "b", prove=lambda *_: {}, source={"kind": "callable", "name": "x"})
    assert [n for n in found.manifest.split["notes"] if n.endswith("a state: the model has no history")]
    inputs = Inputs(found.manifest, 8, 0)
    arrivals = [Arrival(0.0, 1, 3, 2), Arrival(0.1, 1, 0, 3, 1)]
    report = run(InProcess(Session.load(found.path, threads=1)), inputs, arrivals, connections=1, offline=True)
    assert (report.codes, report.events) == ({"ok": 1}, {})


def test_a_history_of_a_fixed_length_says_so_and_what_to_do(tmp_path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item = nn.Embedding(ITEMS, WIDTH)

        def forward(self, history: Tensor, target: Tensor) -> Tensor:
            there = (history != 0).float()[..., None]
            pooled = (self.item(history) * there).sum(1) / there.sum(1).clamp(min=1)
            return (pooled * self.item(target)).sum(-1)

    inputs = (TensorSpec("history", "int64", ("batch", 40), "user", ITEMS), INPUTS[2])
    told: list[str] = []
    model = RequestModel(Mean(), inputs)
    bundle = export_module(
        model, tmp_path / "B", prove=tiny.no_proof, source={"kind": "callable"}, progress=told.append
    )
    (why,) = (note for note in bundle.manifest.split["notes"] if "appended" in note)
    assert "the model's history is padded to 40 events; declare its length as a varying size" in why
