"""The proof of a rewrite: which requests it tries, and what it compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import helper, parser

from stca.export.freeing import freed_and_proven
from stca.export.passes.rules import Rewrite, View
from stca.specs import OFFSETS, TensorSpec


class Instead:
    """Makes what the node `at` makes with another operator of the same inputs, or of the first alone."""

    name = "instead"

    def __init__(self, at: str, operator: str, inputs: int = 1) -> None:
        self.at, self.operator, self.inputs = at, operator, inputs

    def pattern(self, view: View, node: onnx.NodeProto) -> Any | None:
        return node if node.output[0] == self.at and node.op_type != self.operator else None

    def check(self, view: View, match: Any) -> str | None:
        return None

    def rewrite(self, view: View, match: Any) -> Rewrite:
        return Rewrite([helper.make_node(self.operator, match.input[: self.inputs], match.output)])


def why_not(body: str, inputs: Sequence[TensorSpec], rule: Instead) -> str | None:
    """What the proof says of the rewrite of a graph; None where it is kept."""
    types = {"float32": "float", "int64": "int64", "int32": "int32"}
    given = ", ".join(f"{types[s.dtype]}[{', '.join(map(str, s.shape))}] {s.name}" for s in inputs)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g ({given}) => (float[N_t, 2] scores) {{ {body} }}'
    )
    view = View(model, {s.name: str(s.scope) for s in inputs}, {"N_h": 8, "N_t": 3, "L": 4, OFFSETS: 2})
    (verdict,) = freed_and_proven(view, inputs, lambda _: None, [rule]).verdicts
    return verdict.why


TARGET = TensorSpec("target", "float32", ("N_t", 2), "target")
HISTORY = TensorSpec("history", "float32", ("N_h", 2), "user")


def test_packed_requests_are_tried_together() -> None:
    inputs = (HISTORY, TARGET, TensorSpec("target_offsets", "int32", (OFFSETS,), "target"))
    body = """count = Size (target_offsets) one = Constant <value_int: int = 1> () requests = Sub (count, one)
              times = CastLike (requests, target) total = ReduceSum (history) many = Mul (target, times)
              scores = Add (many, total)"""
    assert "differs by" in (why_not(body, inputs, Instead("many", "Identity")) or "")
    assert why_not(body, inputs, Instead("scores", "Sum", 2)) is None


def test_short_histories_that_the_model_does_not_take_are_passed_over() -> None:
    inputs = (TensorSpec("history", "float32", (1, "L", 2), "user"), TARGET)
    body = """five = Constant <value_int: int = 4> () event = Gather <axis: int = 1> (history, five)
              scores = Mul (target, event)"""
    assert why_not(body, inputs, Instead("scores", "Add", 2)) is not None
    fine = body.replace("Mul (target, event)", "Add (target, event)")
    assert why_not(fine, inputs, Instead("scores", "Sum", 2)) is None


def test_what_was_rewritten_is_compared_where_the_scores_are_flat() -> None:
    body = """total = ReduceSum (history) hidden = Add (target, total) far = Constant <value_float: float = 1e9> ()
              scores = Clip (hidden, far)"""
    found = why_not(body, (HISTORY, TARGET), Instead("hidden", "Mul", 2)) or ""
    assert found.startswith("it does not keep the scores: value 'hidden' differs by")


def test_a_model_that_runs_with_nothing_keeps_its_graph() -> None:
    body = """most = Constant <value_int: int = 4096> () there = Gather (history, most)
              scores = Add (target, there)"""
    assert "runs with none" in (why_not(body, (HISTORY, TARGET), Instead("scores", "Sum", 2)) or "")


def test_ids_of_unknown_range_are_drawn_small_where_large_ones_fail() -> None:
    inputs = (TensorSpec("ids", "int64", (1, "L"), "user"), TARGET)
    body = """table = Constant <value: tensor = float[5, 2] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}> ()
              rows = Gather (table, ids) sum = ReduceSum <keepdims: int = 0> (rows) scores = Mul (target, sum)"""
    assert "differs by" in (why_not(body, inputs, Instead("scores", "Add", 2)) or "")


def test_a_history_without_some_of_its_events_is_tried_where_ids_are_many() -> None:
    inputs = (TensorSpec("ids", "int64", (1, "L"), "user", limit=10**6), TARGET)
    body = """none = Constant <value_int: int = 0> () there = Greater (ids, none) kept = Cast <to: int = 1> (there)
              half = Constant <value_float: float = 0.5> () side = Sub (kept, half) far = Abs (side)
              sum = ReduceSum (far) scores = Mul (target, sum)"""
    assert "value 'far' differs by" in (
        why_not(body, inputs, Instead("far", "Identity")) or ""
    )  # alike for events alone


def test_packed_histories_are_tried_without_their_events_too() -> None:
    """Their offsets come with the packing, and not with a request."""
    offsets = TensorSpec("history_offsets", "int32", (OFFSETS,), "user")
    inputs = (TensorSpec("ids", "int64", ("N_h",), "user", limit=10**6), offsets, TARGET)
    body = """ends = ReduceMax (history_offsets) end = CastLike (ends, target) many = ReduceSum (ids)
              all = CastLike (many, target) scaled = Mul (target, end) scores = Add (scaled, all)"""
    assert why_not(body, inputs, Instead("scores", "Sum", 2)) is None
