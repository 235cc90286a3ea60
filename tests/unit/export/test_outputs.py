"""Scores are rows of targets, whatever way a model lays them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stca.checks.verify import prove
from stca.export.pipeline import export_module
from stca.export.to_onnx import RequestModel
from stca.runtime import Request, Session
from stca.specs import TensorSpec

EVENTS, TARGETS = 5, 4
LAYOUTS: dict[str, Any] = {
    "a number each": lambda s: s[:, 0],
    "a row": lambda s: s[:, 0][None],
    "a row of pairs": lambda s: s[None],
    "tasks first": lambda s: s.T,
    "a column": lambda s: s[:, :1],
    "squeezed of every axis": lambda s: s[:, :1].squeeze(),
    "a table each": lambda s: s.reshape(-1, 2, 1),
    "two outputs": lambda s: {"click": s[:, 0], "watch": s[:, 1][None]},
}


class Ranker(nn.Module):
    """Two scores of each target, laid out as asked."""

    def __init__(self, layout: str, pointwise: bool) -> None:
        super().__init__()
        self.layout, self.pointwise = LAYOUTS[layout], pointwise
        self.mix = nn.Linear(8, 2)

    def forward(self, history: torch.Tensor, target: torch.Tensor) -> Any:
        user = history.mean(-2)
        return self.layout(self.mix(torch.cat([user * target, user.expand_as(target)], -1)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pointwise", [False, True], ids=["request", "pointwise"])
def test_a_row_for_each_target(layout, pointwise, tmp_path):
    if pointwise and layout in ("a row", "a row of pairs", "two outputs"):
        pytest.skip("a pointwise model has its batch first or last")
    rows: tuple[Any, Any] = (("batch", "len", 4), ("batch", 4)) if pointwise else (("len", 4), ("items", 4))
    torch.manual_seed(0)
    module = Ranker(layout, pointwise).eval()
    inputs = (TensorSpec("history", "float32", rows[0], "user"), TensorSpec("target", "float32", rows[1], "target"))
    bundle = export_module(RequestModel(module, inputs), tmp_path / "B", prove=prove, source={"kind": "callable"})
    rng = np.random.default_rng(0)
    history, target = (rng.standard_normal((n, 4)).astype(np.float32) for n in (EVENTS, TARGETS))
    with Session.load(bundle.path, threads=1) as session:
        scores = session.score(Request({"history": history[None] if pointwise else history, "target": target}))
        none = session.score(Request({"history": history[None] if pointwise else history, "target": target[:0]}))
        tasks = session.tasks
    with torch.no_grad():
        user = torch.from_numpy(history).mean(0)
        wanted = module.mix(torch.cat([user * torch.from_numpy(target), user.expand(TARGETS, 4)], -1)).numpy()
    width = 1 if layout in ("a number each", "a row", "a column", "squeezed of every axis") else 2
    assert scores.shape == (TARGETS, width)
    assert none.shape == (0, width)
    np.testing.assert_allclose(scores, wanted[:, :width], rtol=1e-5, atol=1e-6)
    names = ("scores",) if width == 1 else ("scores[0]", "scores[1]")
    assert tasks == (("click", "watch") if layout == "two outputs" else names)
