"""Casts and Einsums in other words give what they gave."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from stca.export.passes.spelled_out import spell_out

X, Y, Z = (
    np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate([(3, 4), (3, 4, 2), (2, 5)])
)


def spelled(body: str) -> list[str]:
    """Operators of a graph after the pass; it gives what it gave before."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[A, B] x, float[A, B, C] y, float[C, D] z, int64[N] i) '
        f"=> (float[M, O] out) {{ {body} }}"
    )
    feeds = {"x": X, "y": Y, "z": Z, "i": np.arange(4)}
    wanted = ReferenceEvaluator(model).run(None, feeds)[0]
    spell_out(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, feeds)[0], wanted, rtol=1e-5, atol=1e-6)
    return [n.op_type for n in model.graph.node]


def test_a_cast_to_the_type_of_another_value_says_it() -> None:
    assert spelled("a = CastLike(i, x) out = Add(x, a)") == ["Cast", "Add"]


def test_a_cast_to_the_same_type_goes_unless_it_makes_an_output() -> None:
    assert spelled("a = Neg(x) b = CastLike(a, x) out = Neg(b)") == ["Neg", "Neg"]
    assert spelled("a = Neg(x) out = CastLike(a, x)") == ["Neg", "Cast"]


@pytest.mark.parametrize("equation", ["ab,abc,cd->ad", "ab,abc,cd->bd", "ab,abc,cd->da", "ab, abc, cd -> ad"])
def test_an_einsum_of_three_becomes_two_of_two(equation: str) -> None:
    assert spelled(f'out = Einsum<equation="{equation}">(x, y, z)') == ["Einsum", "Einsum"]


@pytest.mark.parametrize("equation", ["...b,abc,cd->ad", "...b,...bc,cd->...d"])
def test_what_hides_letters_stays(equation: str) -> None:
    assert spelled(f'out = Einsum<equation="{equation}">(x, y, z)') == ["Einsum"]


def test_a_choice_between_booleans_is_one_that_engines_have() -> None:
    body = """zero = Constant<value_float: float = 0>() more = Greater(x, zero) one = Constant<value_float: float = 1>()
        much = Less(x, one) most = Greater(x, one) chosen = Where(more, much, most) out = Cast<to: int = 1>(chosen)"""
    assert spelled(body)[-6:] == ["Greater", "And", "Not", "And", "Or", "Cast"]
    assert spelled(body.replace("Where(more, much, most)", "Where(more, x, x)"))[-2:] == ["Where", "Cast"]
