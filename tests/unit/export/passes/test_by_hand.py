"""A guard that changes no bit of a sum of exponentials is left out, and any other stays."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from stca.export.passes.by_hand import drop_idle_guards
from stca.specs import TensorSpec
from tests.support.rules import view_of

INPUTS = (TensorSpec("t", "float32", ("N_t", 4), "target"),)
CONSTANTS = "axis = Constant <value: tensor = int64[1] {-1}> () last = Constant <value: tensor = int64[1] {1}> () "
LOGITS = "most = ReduceMax (t, axis) below = Sub (t, most) e = Exp (below) s = ReduceSum (e, last) "
NAN = np.full((1, 4), -np.inf, np.float32)


def number(x: float) -> str:
    return f"n = Constant <value: tensor = float[1] {{{x!r}}}> () "


@pytest.mark.parametrize("guard", ["Add (s, n)", "Add (n, s)", "Max (s, n)", "Clip (s, n)"])
def test_what_one_swallows_is_left_out_in_every_bit(guard: str) -> None:
    model = view_of(f"{CONSTANTS}{number(1e-8)}{LOGITS}d = {guard} scores = Div (e, d)", INPUTS, {}).model
    before = ReferenceEvaluator(model)
    drop_idle_guards(model)
    assert [n.op_type for n in model.graph.node if n.op_type in ("Add", "Max", "Clip")] == []
    rows = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32) * 30
    for t in (rows, NAN):
        (was,), (now,) = (of.run(None, {"t": t}) for of in (before, ReferenceEvaluator(model)))
        np.testing.assert_array_equal(now, was)


KEPT = {
    "too much": f"{number(1e-7)}{LOGITS}d = Add (s, n) scores = Div (e, d)",
    "less than nothing": f"{number(-1e-9)}{LOGITS}d = Add (s, n) scores = Div (e, d)",
    "above one": f"{number(1.5)}{LOGITS}d = Max (s, n) scores = Div (e, d)",
    "a largest sum": f"{number(1e-9)}{LOGITS}d = Clip (s, n, n) scores = Div (e, d)",
    "no largest": f"{number(1e-9)} e = Exp (t) s = ReduceSum (e, last) d = Add (s, n) scores = Div (e, d)",
    "the largest of another axis": f"zero = Constant <value: tensor = int64[1] {{0}}> () {number(1e-9)}"
    f"{LOGITS.replace('(t, axis)', '(t, zero)')}d = Add (s, n) scores = Div (e, d)",
    "the largest of other logits": f"{number(1e-9)} u = Neg (t) {LOGITS.replace('(t, axis)', '(u, axis)')}"
    "d = Add (s, n) scores = Div (e, d)",
    "another sum": f"{number(1e-9)}{LOGITS} f = Mul (e, e) r = ReduceSum (f, last) d = Add (r, n) scores = Div (e, d)",
}


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT)
def test_any_other_guard_stays(body: str) -> None:
    model = view_of(CONSTANTS + body, INPUTS, {}).model
    before = model.SerializeToString()
    drop_idle_guards(model)
    assert model.SerializeToString() == before


def test_in_double_1e_9_counts() -> None:
    body = f"{CONSTANTS} n = Constant <value: tensor = double[1] {{1e-9}}> () u = Cast <to: int = 11> (t) "
    body += LOGITS.replace("(t,", "(u,") + "d = Add (s, n) p = Div (e, d) scores = Cast <to: int = 1> (p)"
    model = view_of(body, INPUTS, {}).model
    before = model.SerializeToString()
    drop_idle_guards(model)
    assert model.SerializeToString() == before
