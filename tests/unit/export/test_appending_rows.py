"""Rows of tokens that a model of one user at a time keeps are those of its parts, one behind the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor, nn

from stca.errors import RequestError
from stca.export import RequestModel, TensorSpec
from stca.export.pipeline import export_module
from stca.runtime import Request, Session

ITEMS, WIDTH = 50, 8


class OneUser(nn.Module):
    """Attention of each target over the events of one user, without offsets or a batch axis."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.item, self.place = kind, nn.Embedding(ITEMS, WIDTH), nn.Embedding(600, WIDTH)
        self.k, self.age = nn.Linear(WIDTH, WIDTH), nn.Linear(1, WIDTH)

    def forward(self, history: Tensor, age: Tensor, target: Tensor) -> Tensor:
        x = self.item(history.reshape(-1))
        if self.kind == "places":
            x = x + self.place(torch.arange(x.shape[0]))
        if self.kind == "neighbours":
            x = (x @ x.T).softmax(-1) @ x
        if self.kind == "age in each event":
            x = x + self.age(age)
        x, query = torch.tanh(self.k(x)), self.item(target)
        read = (query @ x.T).softmax(-1) @ x + self.age(age)
        return (read * query).sum(-1)


def exported(out, kind, history=("N_h",)):
    inputs = (
        TensorSpec("history", "int64", history, "user", ITEMS),
        TensorSpec("age", "float32", (1,), "user"),
        TensorSpec("target", "int64", ("N_t",), "target", ITEMS),
    )
    model, source = RequestModel(OneUser(kind), inputs), {"kind": "callable"}
    return export_module(model, out, prove=tiny.no_proof, source=source, max_history=500)


@pytest.mark.parametrize("kind", ["plain", "places", "age in each event"])
def test_events_go_behind_those_of_one_user(tmp_path, kind):
    """Also where an encoding is not of its event alone: so cheap a one is the scorer's, and the state keeps the ids."""
    session = Session.load(exported(tmp_path / "B", kind).path, threads=1)
    events, rest = np.arange(40) * 7 % ITEMS, {"target": np.arange(5)}
    user = {"history": events, "age": np.float32([0.5])}
    session.score(Request({**user, "history": events[:30], **rest}, "ann", 1))
    assert session.append("ann", {"history": events[30:31]}, 2)
    assert session.append("ann", {"history": events[31:]}, 3, after=2)
    wanted = session.score(Request({**user, **rest}))
    np.testing.assert_allclose(session.score(Request(rest, "ann", 3)), wanted, rtol=1e-5)
    with pytest.raises(RequestError, match="age: is no part of an event"):
        session.append("ann", user, 4)


@pytest.mark.parametrize(
    ("kind", "history", "why"),
    [
        ("neighbours", ("N_h",), "their events depend on each other or on other inputs"),
        ("plain", (1, "N_h"), "the events of history on another axis than the first"),
    ],
)
def test_what_is_no_row_of_its_own_is_not_appended_to(tmp_path, kind, history, why):
    bundle = exported(tmp_path / "B", kind, history)
    assert not bundle.manifest.appendable
    with pytest.raises(RequestError, match=why):
        Session.load(bundle.path, threads=1).append("ann", {"history": [1]}, 2)
