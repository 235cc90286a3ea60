"""The number of a packed batch's tokens comes from the offsets, and no state holds tokens for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from stca.checks.verify import prove
from stca.export.passes.packed_sizes import count_by_offsets
from stca.export.pipeline import export_module
from stca.export.to_onnx import RequestModel
from stca.manifest import TensorSpec
from stca.runtime import Request, RequestBatch, Session

INPUTS = (
    TensorSpec("events", "float32", ("N_h", 16), "user"),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("profile", "float32", ("B", 4), "user"),
    TensorSpec("item", "int64", ("N_t",), "target", 50),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)


@pytest.mark.parametrize(
    ("shape", "by_offsets"),
    [
        ("Shape(events)", True),
        ("Shape <start: int = 0, end: int = 1> (events)", True),
        ("Shape <start: int = 1> (events)", False),
        ("Shape(profile)", False),
    ],
)
def test_shapes_are_what_they_were(shape: str, by_offsets: bool) -> None:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[N_h, 16] events, int32[B_plus_1] history_offsets, float[B, 4] profile, int64[N_t] item,
           int32[B_plus_1] target_offsets) => (int64[R] y) {{ y = {shape} }}"""
    )
    feeds = {
        "events": np.zeros((7, 16), np.float32), "history_offsets": np.int32([0, 3, 7]),
        "profile": np.zeros((2, 4), np.float32), "item": np.int64([1]), "target_offsets": np.int32([0, 1, 1]),
    }  # fmt: skip
    (wanted,) = ReferenceEvaluator(model).run(None, feeds)
    count_by_offsets(model, INPUTS)
    assert by_offsets != any(n.op_type == "Shape" for n in model.graph.node)
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_array_equal(found, wanted)


class _Counts(nn.Module):
    """Scores that need of the events how many they are, and whose."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.out = nn.Embedding(50, 4), nn.Linear(4, 1)

    def forward(
        self, events: Tensor, history_offsets: Tensor, profile: Tensor, item: Tensor, target_offsets: Tensor
    ) -> Tensor:
        whose = (torch.arange(item.shape[0])[:, None] >= target_offsets[None, 1:]).sum(1)
        event = torch.arange(events.shape[0])[None]
        mine = (event >= history_offsets[whose][:, None]) & (event < history_offsets[1:][whose][:, None])
        scores: Tensor = self.out(self.item(item) + profile[whose]) * mine.float().sum(1, keepdim=True)
        return scores


def test_a_scorer_that_asks_for_their_number_keeps_no_events(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RequestModel(_Counts(), INPUTS)
    bundle = export_module(model, tmp_path / "bundle", prove=prove, source={"kind": "module"})
    assert [s.name for s in bundle.manifest.state if "N_h" in s.shape] == []
    session = Session.load(tmp_path / "bundle")
    profile, item = np.ones((1, 4), np.float32), np.int64([1, 2])
    for events in (0, 3):
        sent = {"events": np.zeros((events, 16), np.float32), "profile": profile, "item": item}
        offsets = torch.tensor([0, events], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
        with torch.no_grad():
            wanted = model.module(*map(torch.as_tensor, (sent["events"], offsets[0], profile, item, offsets[1])))
        for _ in "missed", "hit":
            found = session.score(Request(sent, user=f"of {events}", version=1))
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    both = {**sent, "profile": np.tile(profile, (2, 1)), "item": np.tile(item, 2)}
    both |= {"history_offsets": np.int32([0, 0, 3]), "target_offsets": np.int32([0, 2, 4])}
    joined = session.score(RequestBatch(both, ["of 0", "of 3"], [1, 1]))
    np.testing.assert_allclose(joined[2:], wanted, rtol=1e-5, atol=1e-6)
    assert session.stats().hits == 4
