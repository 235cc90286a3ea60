"""One table of ONNX's operators: each of one kind, or of none on purpose."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest

from stca.export.analysis import operators

OPSET = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
KINDS = Counter(name for kind in operators.KINDS.values() for name in kind)


def test_every_operator_of_the_opset_is_of_one_kind_or_unknown_on_purpose():
    assert {name for name, kinds in KINDS.items() if kinds > 1} == set()
    assert KINDS.keys() | operators.UNKNOWN >= OPSET, "classify the new operators, or list them in UNKNOWN"
    assert KINDS.keys() & operators.UNKNOWN == set()


def test_no_operator_is_made_up():
    rules = (
        operators.WIDE_RANGE, operators.SPREADS_FLOAT32, operators.HEAD, operators.CARRIES_A_MASK,
        operators.COSTS_NOTHING, operators.OPERATIONS_PER_OUTPUT, operators.OPERATIONS_PER_INPUT,
    )  # fmt: skip
    assert {*KINDS, *operators.UNKNOWN, *(name for rule in rules for name in rule)} <= OPSET


@pytest.mark.parametrize("name", sorted(operators.ELEMENTWISE - {"Cast", "Where", "PRelu", "Clip", "Mod"}))
def test_an_elementwise_operator_keeps_its_inputs_shape(name):
    """By ONNX's own shape inference, which knows nothing of this table."""
    schema = onnx.defs.get_schema(name)
    low = schema.min_input
    kinds = schema.inputs[0].types
    kind = next(t for t in ("tensor(float)", "tensor(bool)", "tensor(uint8)", "tensor(int64)") if t in kinds)
    element = {"tensor(float)": 1, "tensor(bool)": 9, "tensor(uint8)": 2, "tensor(int64)": 7}[kind]
    names = [f"x{i}" for i in range(low)]
    attributes = {"direction": "LEFT"} if name == "BitShift" else {}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(name, names, ["y"], **attributes)],
        "one",
        [onnx.helper.make_tensor_value_info(n, element, ["N", 3]) for n in names],
        [onnx.ValueInfoProto(name="y")],
    )
    inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph), strict_mode=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", 3]
