"""What is taken by number from a sequence of parts is taken from the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from stca.checks.verify import prove
from stca.export.passes.sequences import without_sequences
from stca.export.pipeline import export_module
from stca.export.to_onnx import RequestModel
from stca.specs import TensorSpec

PLACES = " ".join(f"{n} = Constant <value_int: int = {i}> ()" for n, i in (("zero", 0), ("two", 2), ("last", -1)))


@pytest.mark.parametrize(
    ("split", "left"),
    [
        ("sizes = Constant <value_int: int = 2> () s = SplitToSequence <axis: int = 1> (x, sizes)", 0),
        ("sizes = Constant <value_ints: ints = [2, 1, 3]> () s = SplitToSequence <axis: int = -1> (x, sizes)", 0),
        ("s = SplitToSequence <axis: int = 1> (x)", 0),
        ("s = SplitToSequence <axis: int = 1, keepdims: int = 0> (x)", 0),
        ("sizes = Size (n) s = SplitToSequence <axis: int = 1> (x, sizes)", 1),
    ],
)
def test_parts_are_what_they_were(split: str, left: int) -> None:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[A, 6] x, float[2] n) => (float[B, C] y, float[D, E] z)
        {{ {PLACES} {split} a = SequenceAt (s, zero) b = SequenceAt (s, two) y = Neg (a) z = Neg (b) }}"""
    )
    feeds = {"x": np.arange(18, dtype=np.float32).reshape(3, 6), "n": np.zeros(2, np.float32)}
    wanted = ReferenceEvaluator(model).run(None, feeds)
    without_sequences(model)
    assert sum(n.op_type == "SplitToSequence" for n in model.graph.node) == left
    for a, b in zip(ReferenceEvaluator(model).run(None, feeds), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_that_is_counted_from_the_end_stays() -> None:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[A, 6] x) => (float[B, C] y)
        {{ {PLACES} s = SplitToSequence <axis: int = 1> (x) a = SequenceAt (s, last) y = Neg (a) }}"""
    )
    without_sequences(model)
    onnx.checker.check_model(model, full_check=True)
    assert "SequenceAt" in [n.op_type for n in model.graph.node]


class Parts(nn.Module):
    """Gates the user's mean by halves of a layer, as gated units are written."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 4), nn.Linear(8, 8)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        x = torch.cat([self.table(history).mean(1), self.table(item)], 1)
        value, gate = self.layer(x).split(4, 1)
        first, *_ = (value * gate.sigmoid()).unbind(1)
        return first


def test_a_module_that_splits_is_lifted(tmp_path: Path) -> None:
    inputs = (
        TensorSpec("history", "int64", ("batch", 6), "user"),
        TensorSpec("item", "int64", ("batch",), "target"),
    )
    model = RequestModel(Parts().eval(), inputs)
    bundle = export_module(model, tmp_path / "bundle", prove=prove, source={"kind": "callable"})
    assert bundle.manifest.split["lifted"]["rows"] == "batch"


SIDES = "s = SequenceConstruct (x, n)"


@pytest.mark.parametrize(
    "body",
    [
        f"{SIDES} a = SequenceAt (s, last) y = Neg (a)",
        f"{SIDES} y = ConcatFromSequence <axis: int = -1> (s)",
        f"{SIDES} y = ConcatFromSequence <axis: int = 1, new_axis: int = 1> (s)",
        f"{SIDES} y = ConcatFromSequence <axis: int = -1, new_axis: int = 1> (s)",
        f"""{SIDES}
        t = SequenceMap <body: graph = each (float[A, B] v) => (float[A, B] w) {{ h = Neg (v) w = Mul (h, v) }}> (s)
        y = ConcatFromSequence <axis: int = 0> (t)""",
    ],
)
def test_what_is_put_together_is_taken_by_number(body: str) -> None:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[A, B] x, float[A, B] n) => (y) {{ {PLACES} {body} }}"""
    )
    feeds = {n: np.random.default_rng(i).standard_normal((3, 2)).astype(np.float32) for i, n in enumerate("xn")}
    (wanted,) = ReferenceEvaluator(model).run(None, feeds)
    without_sequences(model)
    assert not [n.op_type for n in model.graph.node if "Sequence" in n.op_type]
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, feeds)[0], wanted)


def test_an_output_that_a_body_leaves_out_keeps_its_place() -> None:
    body = """first = Constant <value_ints: ints = [0]> () u = Unsqueeze (v, first)
        w = Constant <value: tensor = float[1, 3, 2] {1, 2, 3, -1, -2, -3}> ()
        r = Constant <value: tensor = float[1, 3, 1] {1, 2, -1}> ()
        , last = GRU <hidden_size: int = 1> (u, w, r) f = Squeeze (last, first)"""
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[A, B] x, float[A, B] n) => (y)
        {{ {SIDES} t = SequenceMap <body: graph = each (float[A, B] v) => (float[C, D] f) {{ {body} }}> (s)
        y = ConcatFromSequence <axis: int = 0> (t) }}"""
    )
    feeds = {n: np.random.default_rng(i).standard_normal((3, 2)).astype(np.float32) for i, n in enumerate("xn")}
    (wanted,) = ReferenceEvaluator(model).run(None, feeds)
    without_sequences(model)
    assert not [n.op_type for n in model.graph.node if "Sequence" in n.op_type]
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, feeds)[0], wanted, rtol=1e-6)


def test_a_place_beyond_the_list_stays() -> None:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[A] x, float[A] n) => (float[A] y)
        {{ {PLACES} {SIDES} a = SequenceAt (s, two) y = Neg (a) }}"""
    )
    without_sequences(model)
    assert "SequenceAt" in [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("axes", [1, 2])
def test_a_branch_taken_by_rank_is_all_there_is(axes: int) -> None:
    """As `torch.hstack` joins by the rank of its first part, in the older exporter's words."""
    join = "<graph> g{0} () => (c{0}) {{ c{0} = ConcatFromSequence <axis: int = {0}> (s) }}"
    branches = ", ".join(
        f"{side}_branch = {join.format(axis).removeprefix('<graph> ')}" for side, axis in (("then", 0), ("else", 1))
    )
    of = "A" if axes == 1 else "A, B"
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[{of}] x, float[{of}] n) => (float[{of}] y)
        {{ {PLACES} {SIDES} first = SequenceAt (s, zero) shape = Shape (first) rank = Size (shape)
        one = Constant <value_int: int = 1> () is = Equal (rank, one) y = If (is) <{branches}> }}"""
    )
    feeds = {n: np.random.default_rng(i).standard_normal((3, 2)[:axes]).astype(np.float32) for i, n in enumerate("xn")}
    (wanted,) = ReferenceEvaluator(model).run(None, feeds)
    without_sequences(model)
    onnx.checker.check_model(model)
    assert {"If", "ConcatFromSequence"}.isdisjoint(n.op_type for n in model.graph.node)
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, feeds)[0], wanted)
