"""Linear layers over concatenations: which are parted, into what, and what the proof says of wrong parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from support.rules import SIZES, freed, same, view_of

from stca.export.freeing import Freed
from stca.export.passes.parts import Part, Parting
from stca.export.passes.rules import View
from stca.export.passes.sums import Match, SumOfProducts
from stca.specs import OFFSETS, TensorSpec

TARGETS_SHAPE = """count = Shape <start: int = 0, end: int = 1> (item) ones = Constant <value_ints: ints = [1, 1]> ()
    wide = Concat <axis: int = 0> (count, ones) one = Constant <value_ints: ints = [1]> ()
    flat = Concat <axis: int = 0> (count, one)"""
# The scorer of DIN: an MLP over [k, q, q - k, q k], each repeated for the others.
DIN = f"""{TARGETS_SHAPE} column = Unsqueeze (item, one)
    events = Shape <start: int = 1, end: int = 2> (history) long = Concat <axis: int = 0> (one, events, one)
    q = Expand (column, long) k = Expand (history, wide) less = Sub (q, history) times = Mul (q, history)
    x = Concat <axis: int = -1> (k, q, less, times) product = MatMul (x, W) y = Add (product, b)
    hidden = Relu (y) weights = MatMul (hidden, V) pooled = Mul (weights, history)
    scores = ReduceSum <keepdims: int = 0> (pooled, one)"""
# The first layer of a top MLP over [profile, item, crossed].
TOP = f"""{TARGETS_SHAPE} profiles = Expand (profile, flat) crossed = Mul (item, item)
    x = Concat <axis: int = 1> (profiles, item, crossed) y = Gemm <transB: int = 1> (x, W, b) scores = Tanh (y)"""
HISTORY = TensorSpec("history", "float32", (1, "L", 64), "user")
PROFILE = TensorSpec("profile", "float32", (1, 64), "user")
ITEM = TensorSpec("item", "float32", ("N_t", 64), "target")
WEIGHTS = {"din": {"W": (256, 48), "b": (48,), "V": (48, 1)}, "top": {"W": (80, 192), "b": (80,)}}


def din() -> tuple[View, Sequence[TensorSpec]]:
    return view_of(DIN, (HISTORY, ITEM), WEIGHTS["din"]), (HISTORY, ITEM)


def top() -> tuple[View, Sequence[TensorSpec]]:
    return view_of(TOP, (PROFILE, ITEM), WEIGHTS["top"]), (PROFILE, ITEM)


def refused(body: str, inputs: Sequence[TensorSpec], weights: dict[str, Any], sizes: dict[str, int] = SIZES) -> str:
    """Why the one layer of a graph stays whole."""
    view = view_of(body, inputs, weights, sizes)
    found = freed(view, inputs, SumOfProducts())
    (verdict,) = found.verdicts
    assert verdict.why is not None
    assert found.model is view.model
    return verdict.why


def kinds(model: onnx.ModelProto, view: View, above: str = "constant") -> list[str]:
    """Operators of the nodes that read an input."""
    scopes = View(model, view.inputs, view.workload).scopes
    return [n.op_type for n in model.graph.node if str(scopes[n.output[0]]) != above and n.op_type != "Constant"]


def test_a_scorer_of_differences_and_products_becomes_one_product_per_target() -> None:
    view, inputs = din()
    after = freed(view, inputs, SumOfProducts())
    assert [(v.node, v.why) for v in after.verdicts] == [("y", None)]
    after_view = View(after.model, view.inputs, view.workload)
    (product,) = (n for n in after.model.graph.node if n.output[0] == "y")
    value, weight = product.input
    assert after_view.sizes.shape(value) == (1, 500, 65)  # the history and a column of ones, once
    assert after_view.sizes.shape(weight) == (300, 65, 48)
    was, now = (sum(map(v.sizes.work, v.model.graph.node)) for v in (view, after_view))
    assert now < was / 3
    for targets, events in ((1, 1), (2, 7), (9, 3)):
        same(view.model, after.model, {"history": (1, events, 64), "item": (targets, 64)})


def test_a_top_layer_takes_the_users_part_as_its_bias() -> None:
    view, inputs = top()
    after = freed(view, inputs, SumOfProducts())
    assert [(v.node, v.why) for v in after.verdicts] == [("y", None)]
    assert kinds(after.model, view) == ["Mul", "MatMul", "Add", "Concat", "Gemm", "Tanh"]
    after_view = View(after.model, view.inputs, view.workload)
    gemm = next(n for n in after.model.graph.node if n.op_type == "Gemm")
    assert str(after_view.scopes[gemm.input[2]]) == "user"
    assert after_view.sizes.shape(gemm.input[0]) == (300, 128)
    for targets in (0, 1, 5):
        same(view.model, after.model, {"profile": (1, 64), "item": (targets, 64)})


def test_weights_of_the_model_stay_its_initializers() -> None:
    for view, inputs in (din(), top()):
        was = {t.name: t.raw_data for t in view.model.graph.initializer}
        now = {
            t.name: t.raw_data
            for t in freed(view, inputs, SumOfProducts()).model.graph.initializer
            if t.data_type == 1 and t.dims
        }
        assert now == was


def test_layers_that_read_the_same_input_share_what_is_left_of_it() -> None:
    body = TOP.replace("scores = Tanh (y)", "z = Gemm <transB: int = 1> (x, U) scores = Sub (y, z)")
    view = view_of(body, (PROFILE, ITEM), {**WEIGHTS["top"], "U": (80, 192)})
    after = freed(view, (PROFILE, ITEM), SumOfProducts())
    assert [v.why for v in after.verdicts] == [None, None]
    assert kinds(after.model, view).count("Concat") == 1
    same(view.model, after.model, {"profile": (1, 64), "item": (3, 64)})


def test_a_users_row_that_is_picked_for_each_target_is_multiplied_before() -> None:
    offsets = TensorSpec("target_offsets", "int32", (OFFSETS,), "target")
    profile = dataclasses.replace(PROFILE, shape=("B", 64))
    body = """zero = Constant <value_int: int = 0> () one_row = Constant <value_ints: ints = [1]> ()
        column = Gather <axis: int = 1> (item, zero) nothing = Sub (column, column) none = Cast <to: int = 7> (nothing)
        each = Add (none, one_row) numbers = CumSum (each, zero) row = Sub (numbers, one_row)
        turned = Unsqueeze (row, one_row) after_first = Slice (target_offsets, one_row, last)
        wide = Cast <to: int = 7> (after_first) ended = GreaterOrEqual (turned, wide) is = Cast <to: int = 7> (ended)
        segment = ReduceSum <keepdims: int = 0> (is, one_row) users = Gather (profile, segment)
        x = Concat <axis: int = 1> (users, item) y = MatMul (x, W) scores = Add (y, b)"""
    inputs = (profile, ITEM, offsets)
    weights = {"W": (128, 80), "b": (80,), "last": np.array([2**31], np.int64)}
    view = view_of(body, inputs, weights, {**SIZES, "B": 2, OFFSETS: 3})
    after = freed(view, inputs, SumOfProducts())
    assert [(v.node, v.why) for v in after.verdicts] == [("scores", None)]
    gather = [n for n in after.model.graph.node if n.op_type == "Gather"][-1]
    assert str(View(after.model, view.inputs, view.workload).scopes[gather.input[0]]) == "user"
    assert "MatMul" in [n.op_type for n in after.model.graph.node if n.output[0] == gather.input[0]]


@pytest.mark.parametrize("equation", ["blc,cn->bln", "blc,nc->bln"])
def test_an_einsum_is_a_linear_layer_too(equation: str) -> None:
    body = DIN.replace("product = MatMul (x, W)", f'product = Einsum <equation: string = "{equation}"> (x, W)')
    weights = {**WEIGHTS["din"], "W": (256, 48) if "cn" in equation else (48, 256)}
    view = view_of(body, (HISTORY, ITEM), weights)
    after = freed(view, (HISTORY, ITEM), SumOfProducts())
    assert [v.why for v in after.verdicts] == [None]
    same(view.model, after.model, {"history": (1, 4, 64), "item": (3, 64)})


def test_a_layer_that_costs_more_in_parts_stays_whole() -> None:
    narrow = (dataclasses.replace(PROFILE, shape=(1, 1)), dataclasses.replace(ITEM, shape=("N_t", 1)))
    why = refused(TOP, narrow, {"W": (1, 3), "b": (1,)})
    assert why.startswith("in parts it takes as much as ")


def test_a_sum_with_more_columns_is_no_bias() -> None:
    body = f"""{TARGETS_SHAPE} profiles = Expand (profile, flat) x = Concat <axis: int = 1> (profiles, item)
               y = MatMul (x, W) scores = Add (y, b)"""
    view = view_of(body, (PROFILE, ITEM), {"W": (128, 1), "b": (6,)})
    after = freed(view, (PROFILE, ITEM), SumOfProducts())
    assert [v.why for v in after.verdicts if v.node == "scores"] == []
    same(view.model, after.model, {"profile": (1, 64), "item": (3, 64)})


def test_a_sum_of_sums_has_an_end() -> None:
    twice = " ".join(f"x{i + 1} = Add (x{i}, x{i})" for i in range(60))
    body = f"""x0 = Add (item, profile) {twice}
               scores = MatMul (x60, W)"""
    view = view_of(body, (PROFILE, ITEM), {"W": (64, 4)})
    assert len(Parting(view, "x60", 4).parts) == 1


def test_parts_that_do_not_make_up_the_rows_stay_whole() -> None:
    body = f"""{TARGETS_SHAPE} a = Expand (profile, flat) b_ = Expand (other, flat)
        x = Concat <axis: int = 1> (a, b_) y = MatMul (x, W) scores = Mul (y, item)"""
    other = dataclasses.replace(PROFILE, name="other")
    why = refused(body, (PROFILE, other, ITEM), {"W": (128, 64)})
    assert why == "what 'x' is made from does not broadcast to its rows"


@pytest.mark.parametrize(
    "body",
    [
        "x = Concat <axis: int = 1> (item, item) scores = MatMul (x, W)",  # nothing of the user
        "x = Concat <axis: int = 0> (item, item) scores = MatMul (x, W)",  # along rows
        "x = Relu (item) scores = MatMul (x, W)",
    ],
)
def test_other_layers_are_no_match(body: str) -> None:
    width = 128 if "axis: int = 1" in body else 64
    view = view_of(body, (ITEM,), {"W": (width, 8)})
    assert freed(view, (ITEM,), SumOfProducts()) == Freed(view.model, ())


def _each(change: Callable[[Part], Part]) -> Callable[[Match], Match]:
    def changed(match: Match) -> Match:
        groups = tuple(
            dataclasses.replace(g, values={v: [change(p) for p in parts] for v, parts in g.values.items()})
            for g in match.groups
        )
        return dataclasses.replace(match, groups=groups)

    return changed


MUTANTS: dict[str, Callable[[Match], Match]] = {
    "a part is dropped": lambda m: dataclasses.replace(m, groups=m.groups[1:]),
    "a place of a value is dropped": lambda m: dataclasses.replace(
        m, groups=tuple(dataclasses.replace(g, values={v: ps[:1] for v, ps in g.values.items()}) for g in m.groups)
    ),
    "rows of another part": _each(lambda p: dataclasses.replace(p, start=(p.start + 64) % 192)),
    "rows one too far": _each(lambda p: dataclasses.replace(p, start=p.start + 1) if p.start == 64 else p),
    "q - k as q + k": _each(lambda p: dataclasses.replace(p, sign=1)),
    "k - q for q - k": _each(lambda p: dataclasses.replace(p, sign=-p.sign) if p.start == 128 else p),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_parts_do_not_pass_the_proof(mutant: str) -> None:
    class Mutant(SumOfProducts):
        def rewrite(self, view: View, match: Match) -> Any:
            return super().rewrite(view, MUTANTS[mutant](match))

    view, inputs = din()
    found = freed(view, inputs, Mutant())
    assert found.model is view.model
    assert (found.verdicts[0].why or "").startswith("it does not keep the scores: value 'y' differs by ")
