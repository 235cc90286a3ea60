"""ONNX models made ready for TensorRT: which plugins replace a node, and when that is refused."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from stca.errors import BuildError
from stca.plugins import onnx_function, tensorrt_graph
from stca.plugins.tiling import Sizes

FEW = Sizes(targets=1, tokens=10_000, requests=1)
MANY = Sizes(targets=4096, tokens=512, requests=1)


def model(
    heads: int | str = 16,
    key_heads: int = 16,
    depth: int = 64,
    *,
    dtype: int = TensorProto.BFLOAT16,
    tied: bool = False,
    layers: int = 1,
    lists: bool = False,
) -> onnx.ModelProto:
    """Attention layers in a row, each reading the one before as its query; the shapes between them are inferred."""
    info = helper.make_tensor_value_info
    inputs = [
        info("query", dtype, ["N_t", heads, depth]),
        info("key", dtype, ["N_h", key_heads, depth]),
        info("value", dtype, ["N_h", key_heads, depth]),
        *(info(name, TensorProto.INT32, [n]) for name, n in (("t", "B+1"), ("h", "B+1"), ("l", "B"))),
    ]
    ends = ["t", "h", "l"]
    if lists:
        inputs += [info("s", TensorProto.INT32, ["B+1"]), info("bias", TensorProto.FLOAT, ["N_s"])]
        ends += ["s", "bias"]
    nodes = [
        helper.make_node(
            "TargetHistoryAttention",
            ["query" if i == 0 else f"out{i - 1}", "key", "key" if tied else "value", *ends],
            [f"out{i}"],
            name=f"attention{i}",
            domain="stca",
            scale=0.125,
        )
        for i in range(layers)
    ]
    outputs = [info(f"out{layers - 1}", dtype, ["N_t", heads, depth])]
    made = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("stca", 1)],
    )
    onnx_function.attach(made)
    return made


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_mark_adds_the_namespace_once_and_nothing_else() -> None:
    marked, plain = model(layers=2), model(layers=2)
    tensorrt_graph.mark(marked)
    tensorrt_graph.mark(marked)
    for node in marked.graph.node:
        assert attributes(node) == {"scale": 0.125, "plugin_namespace": b"stca"}
        del node.attribute[1:]
    assert marked == plain


def test_without_sizes_each_node_becomes_one_plugin() -> None:
    given = model()
    before = given.SerializeToString()
    (node,) = tensorrt_graph.prepare(given).graph.node
    assert (node.domain, node.op_type, node.name) == ("stca", "TargetHistoryAttention", "attention0")
    assert attributes(node) == {"scale": 0.125, "plugin_namespace": b"stca"}
    assert given.SerializeToString() == before

    (node,) = tensorrt_graph.prepare(model(key_heads=1, depth=1024, tied=True)).graph.node
    assert node.op_type == "TargetHistoryAttentionTied"
    assert list(node.input) == ["query", "key", "key", "t", "h", "l"]


def test_history_is_cut_where_one_pass_would_leave_the_gpu_idle() -> None:
    parts, join = tensorrt_graph.prepare(model(tied=True), FEW, 90).graph.node
    assert parts.op_type == "TargetHistoryAttentionParts"
    given = attributes(parts)
    assert given.pop("parts") > 1  # type: ignore[operator]
    assert given == {"scale": 0.125, "tied": 1, "plugin_namespace": b"stca"}
    assert join.op_type == "TargetHistoryAttentionJoin"
    assert attributes(join) == {"dtype": b"bfloat16", "plugin_namespace": b"stca"}
    assert list(parts.output) == list(join.input)
    assert list(join.output) == ["out0"]

    (node,) = tensorrt_graph.prepare(model(), MANY, 90).graph.node
    assert node.op_type == "TargetHistoryAttention"


def test_lists_of_segments_have_plugins_of_their_own() -> None:
    (node,) = tensorrt_graph.prepare(model(lists=True)).graph.node
    assert node.op_type == "TargetHistoryAttentionSegments"
    assert attributes(node) == {"scale": 0.125, "tied": 0, "plugin_namespace": b"stca"}
    assert list(node.input) == ["query", "key", "value", "t", "h", "l", "s", "bias"]
    parts, join = tensorrt_graph.prepare(model(lists=True, tied=True), FEW, 90).graph.node
    assert (parts.op_type, join.op_type) == ("TargetHistoryAttentionSegmentsParts", "TargetHistoryAttentionJoin")
    assert len(parts.input) == 8
    assert [shape.segments for shape, _ in tensorrt_graph.operators(model(lists=True))] == [True]


def test_layers_keep_their_order_and_names_do_not_collide() -> None:
    nodes = tensorrt_graph.prepare(model(layers=3), FEW, 90).graph.node
    assert [node.op_type.removeprefix("TargetHistoryAttention") for node in nodes] == ["Parts", "Join"] * 3
    produced = [name for node in nodes for name in node.output]
    assert len(set(produced)) == len(produced) == 9
    available = {"query", "key", "value", "t", "h", "l"}
    for node in nodes:
        assert set(node.input) <= available
        available |= set(node.output)


def test_what_has_no_kernel_is_refused_by_name() -> None:
    with pytest.raises(BuildError, match="'attention0': query 'query' has dynamic heads or head size"):
        tensorrt_graph.prepare(model(heads="H"))
    with pytest.raises(BuildError, match="D = 40 is not supported; the kernels take multiples of 16"):
        tensorrt_graph.prepare(model(depth=40))
    with pytest.raises(BuildError, match="dtype DOUBLE is not supported; use bfloat16, float16, float32"):
        tensorrt_graph.prepare(model(dtype=TensorProto.DOUBLE))
    with pytest.raises(BuildError, match="SM 70: supported are 80"):
        tensorrt_graph.prepare(model(), FEW, 70)
    with pytest.raises(BuildError, match="sizes without sm; name the GPU's compute capability too, such as sm=90"):
        tensorrt_graph.prepare(model(), FEW)
    with pytest.raises(BuildError, match=f"N_t \\* H is {2**31}, expected less than {2**31 - 2**15}"):
        tensorrt_graph.prepare(model(), Sizes(2**27, 10_000, 1), 90)
