"""Casts and Einsums in other words give what they gave."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession
from torch import Tensor, nn

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


def quotient(base: int, body: str, target: str | None) -> onnx.ModelProto:
    """A Log over its base's, with what torch's exporter keeps of the call that it is of."""
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[N] x) => (float[N] y)
        <float c = {{{np.float32(np.log(base))}}}> {{ {body} y = Div (l, c) }}"""
    )
    if target is not None:
        call = f"%y : [num_users=1] = call_function[target=torch.ops.aten.{target}](args = (%x,), kwargs = {{}})"
        model.graph.node[-1].metadata_props.add(key="pkg.torch.onnx.fx_node", value=call)
    return model


@pytest.mark.parametrize(("base", "last"), [(2, 24), (10, 11)])
@pytest.mark.parametrize("body", ["l = Log (x)", "a = CastLike (x, c) l = Log (a)"])
def test_the_logarithm_of_a_power_is_whole(base: int, last: int, body: str) -> None:
    """ONNX has the natural one alone, and a quotient of two may be just below: PyTorch's own logarithm is not."""
    model = quotient(base, body, f"log{base}.default")
    powers = np.float32(base) ** np.arange(last, dtype=np.float32)
    x = np.concatenate([powers, np.nextafter(powers, np.float32(0)), np.abs(X[0])])
    before = InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    (note,) = spell_out(model)
    assert f"log{base} " in note
    onnx.checker.check_model(model, full_check=True)
    (y,) = InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_array_equal(y[:last], np.arange(last))
    np.testing.assert_array_equal(y[last:], before[last:])
    assert base == 10 or (before[:last] != np.arange(last)).any()  # or there would be nothing to do


@pytest.mark.parametrize("target", [None, "div.Tensor"])
def test_a_quotient_of_the_models_own_stays(target: str | None) -> None:
    """PyTorch computes `torch.log(x) / math.log(2)` as it stands, below the whole number at 8192."""
    model = quotient(2, "l = Log (x)", target)
    assert spell_out(model) == ()
    assert [n.op_type for n in model.graph.node] == ["Log", "Div"]


def test_what_the_older_exporter_writes_is_taken_for_the_logarithm() -> None:
    model = quotient(2, "l = Log (x)", None)
    model.producer_name = "pytorch"
    (note,) = spell_out(model)
    assert "export with dynamo=True" in note
    model = quotient(10, "l = Log (x)", None)
    model.producer_name = "pytorch"
    assert spell_out(model) == ()


def test_the_exporter_tells_the_two_apart(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return torch.log2(x), torch.log(y) / math.log(2)

    x = 2.0 ** torch.arange(24)
    torch.onnx.export(Both().eval(), (x, x.clone()), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    model = onnx.load(tmp_path / "m.onnx")
    feeds = dict.fromkeys((i.name for i in model.graph.input), x.numpy())
    before = InferenceSession(model.SerializeToString()).run(None, feeds)
    assert len(spell_out(model)) == 1
    whole, own = InferenceSession(model.SerializeToString()).run(None, feeds)
    np.testing.assert_array_equal(whole, np.arange(24))
    np.testing.assert_array_equal(own, before[1])
    assert (own != whole)[1:].any()


def test_a_quotient_by_another_number_stays() -> None:
    body = "a = Abs(x) l = Log(a) c = Constant<value: tensor = float {0.5}>() out = Div(l, c)"
    assert spelled(body) == ["Abs", "Log", "Constant", "Div"]
