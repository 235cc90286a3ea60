"""The short form of the fuzzer of calls, and that it sees what goes wrong."""

from __future__ import annotations

import calls
import pytest


def found(first: int, end: int) -> dict:
    state = {"seed": 1, "next": first, "counts": {}, "wrong": []}
    calls.run(state, end)
    return state


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of quantized tensors
def test_nothing_goes_wrong():
    state = found(0, 300)
    assert state["wrong"] == []
    assert {"right requests", "right batches", "appends", "spoilt keys: RequestError"} <= state["counts"].keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_goes_wrong_is_seen(monkeypatch):
    right = calls.Session.score
    monkeypatch.setattr(
        calls.Session, "score", lambda self, r: right(self, r) + 1e-3 * (self._store.stats().budget > 0)
    )
    assert found(0, 10)["wrong"]
    monkeypatch.setattr(calls.Session, "score", lambda self, r: {}["two\nlines"])
    assert any("KeyError" in one["what"] for one in found(0, 10)["wrong"])
