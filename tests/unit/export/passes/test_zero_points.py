"""Integer products that a processor without VNNI would cut off, and the zero points that keep it from that."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stca.export.analysis.onnx_reference import reference_of
from stca.export.passes.zero_points import name_zero_points
from stca.runtime import OnnxRuntimeEngine


def model(scales, zero):
    """`x · a` and `x · b` of int8, every number as large as it gets; `zero` names what both read, "" nothing."""
    tensor, node = numpy_helper.from_array, helper.make_node
    nodes = []
    for name in "ab":  # of a factor that both read, ONNX Runtime would make no integer product
        nodes += [
            node("QuantizeLinear", ["x", f"step_{name}", "none"], [f"kept_{name}"]),
            node("DequantizeLinear", [f"kept_{name}", f"step_{name}", "none"], [f"read_{name}"]),
            node("DequantizeLinear", [f"{name}_int8", "scales", zero], [name], axis=1),
            node("MatMul", [f"read_{name}", name], [f"y{name}"]),
        ]
    given, *made = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", w]) for n, w in (("x", 32), ("ya", 8), ("yb", 8))
    )
    weights = {
        "a_int8": np.full((32, 8), 127, np.int8),
        "b_int8": np.full((32, 8), -127, np.int8),
        "scales": np.full(scales, 0.5, np.float32),
        "zeros": np.zeros(scales, np.int8),
        "step_a": np.float32(1),
        "step_b": np.float32(2),
        "none": np.int8(0),
    }
    graph = helper.make_graph(nodes, "g", [given], made, [tensor(np.asarray(w), n) for n, w in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@pytest.mark.parametrize(("scales", "zero"), [((8,), ""), ((8,), "zeros"), ((), "zeros"), ((), "")])
def test_onnx_runtime_computes_all_of_a_large_product(tmp_path, scales, zero):
    made = model(scales, zero)
    name_zero_points(made)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, tmp_path / "m.onnx")
    x = np.full((5, 32), 254, np.float32)
    wanted = reference_of(model(scales, zero)).run(None, {"x": x})
    for found, own in zip(
        OnnxRuntimeEngine(tmp_path / "m.onnx", threads=1).run({"x": x}).values(), wanted, strict=True
    ):
        np.testing.assert_array_equal(found, own)


def test_each_weight_has_a_zero_point_of_its_own_once():
    made = model((8,), "zeros")
    name_zero_points(made)
    zeros = [n.input[2] for n in made.graph.node if n.op_type == "DequantizeLinear"]
    assert len({*zeros}) == len(zeros) - 1  # of activations, one will do
    again = made.SerializeToString()
    name_zero_points(made)
    assert made.SerializeToString() == again
