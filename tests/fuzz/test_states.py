"""The short form of the store's schedules, and that they see a key that leaves something out."""

from __future__ import annotations

import pytest
import states

from stca.runtime.model import Model
from stca.runtime.state import StateKey
from stca.runtime.store import StateStore


def test_the_short_form():
    counts, wrong = states.run(8, 60, 1)
    assert wrong == []
    ways = ("score", "hit", "append", "amend", "warm", "forget", "swap", "restart", "crash", "damage", "together")
    assert [way for way in ways if not counts[way]] == []
    done = ("hits from memory", "hits from a file", "evictions from memory", "evictions from files", "expired")
    assert [what for what in (*done, "records discarded") if not counts[f"store: {what}"]] == []


@pytest.mark.parametrize("left_out", ["version", "weights"])
def test_a_key_that_leaves_something_out_is_seen(left_out, monkeypatch):
    def key(model, user, version):
        weights = "all" if left_out == "weights" else model.manifest.weights
        return StateKey(user, 0 if left_out == "version" else version, weights, model.format[:0])

    serve = StateStore.serve
    monkeypatch.setattr(Model, "key", key)
    monkeypatch.setattr(
        StateStore,
        "serve",
        lambda store, weights, _: serve(store, "all" if left_out == "weights" else weights, ""),
    )
    _, wrong = states.run(30, 60, 1)  # the first that is seen ends it
    assert wrong
