"""What plain summation loses widens a limit for models that sum much, and for no other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from stca.checks import plain_sums
from stca.checks.plain_sums import plain_error


@pytest.mark.parametrize(
    ("a", "b"),
    [((5,), (5,)), ((5,), (5, 3)), ((2, 5), (5,)), ((4, 2, 5), (5, 3)), ((1, 2, 5), (4, 5, 3)), ((5,), (4, 5, 3))],
)
def test_products_are_numpys(a, b):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=a), rng.normal(size=b)
    np.testing.assert_allclose(plain_sums.product(a, b), a @ b)
    assert plain_sums.product(a, b).shape == (a @ b).shape


@pytest.mark.parametrize("axes", [None, (0,), (-1,), (0, 2)])
@pytest.mark.parametrize("keep", [0, 1])
def test_totals_are_numpys(axes, keep):
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(plain_sums.total(x, axes, keep), x.sum(axis=axes, keepdims=bool(keep)))


@pytest.mark.parametrize("n", [1, 8, 9])
@pytest.mark.parametrize("padded", [0, 3])
def test_spectra_are_numpys(n, padded):
    rng = np.random.default_rng(0)
    x, length = rng.normal(size=(2, n, 3, 2)), n + padded
    z = x[..., 0] + 1j * x[..., 1]

    def parts(z):
        return np.stack([z.real, z.imag], -1)

    np.testing.assert_allclose(plain_sums.spectrum(x, length, 1, False, False), parts(np.fft.fft(z, length, 1)))
    np.testing.assert_allclose(plain_sums.spectrum(x, length, 1, True, False), parts(np.fft.ifft(z, length, 1)))
    real = plain_sums.spectrum(x[..., :1], length, 1, False, True)
    np.testing.assert_allclose(real, parts(np.fft.rfft(z.real, length, 1)), atol=1e-12)
    half = plain_sums.spectrum(real, length, 1, True, True)
    np.testing.assert_allclose(half[..., 0], np.fft.irfft(np.fft.rfft(z.real, length, 1), length, 1), atol=1e-12)


@pytest.mark.parametrize("opset", [18, 20])
def test_a_spectrum_loses_by_its_length(tmp_path, opset):
    x = helper.make_node("Unsqueeze", ["x", "last"], ["z"])
    last = helper.make_node("Constant", [], ["last"], value_ints=[2])
    axis = helper.make_node("Constant", [], ["axis"], value_int=0)
    given = {"inputs": ["z", "", "axis"]} if opset == 20 else {"inputs": ["z"], "axis": 0}
    file = graph(tmp_path / "s.onnx", [last, axis, x, helper.make_node("DFT", outputs=["y"], **given)], opset)
    assert 0 < loss(file, 30) < loss(file, 3000) / 4


def graph(path, nodes, opset=18):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    onnx.save(made, path)
    return path


def loss(path, n):
    x = np.random.default_rng(0).uniform(size=(n, 2)).astype(np.float32)
    return plain_error(path, [{"x": x}]) / n


def test_the_error_grows_with_what_is_summed(tmp_path):
    """numpy sums in pairs, and would lose next to nothing at any length."""
    axes = helper.make_node("Constant", [], ["axes"], value_ints=[0])
    file = graph(tmp_path / "sum.onnx", [axes, helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)])
    assert 0 < loss(file, 10) < 2.0**-23
    assert loss(file, 10_000) > 4 * 2.0**-23


def test_what_the_reference_cannot_run_excuses_nothing(tmp_path):
    wrong = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    wrong.insert(0, helper.make_node("Constant", [], ["shape"], value_ints=[7]))
    assert loss(graph(tmp_path / "wrong.onnx", wrong), 10) == 0
