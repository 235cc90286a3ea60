"""Bytes and work at nominal sizes, against counts done by hand."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper, parser
from support.graphs import attention_graph

from stca.errors import SplitError
from stca.export.analysis.cost import NominalSizes, element_bits, without_weights

N, M = 100, 7
INPUTS = "float[N, 8] x, float[M, 8] y, float[1, N, 8] s, float[1, 4, N] c, int64[N] ids, bool flag"


def sizes_of(body: str, initializers: str = "", opset: int = 18) -> tuple[NominalSizes, onnx.NodeProto]:
    imports = f'["": {opset}, "other": 1]'
    text = f"<ir_version: 10, opset_import: {imports}> g ({INPUTS}) => () <{initializers}> {{ {body} }}"
    model = parser.parse_model(text)
    return NominalSizes(model, {"N": N, "M": M}), model.graph.node[-1]


@pytest.mark.parametrize(
    ("body", "work"),
    [
        ("z = Add (x, x)", N * 8),
        ("z = Cast <to: int = 10> (x)", N * 8),
        ("z = Transpose (x)", N * 8),
        ("z = Exp (x)", 8 * N * 8),
        ("z = Softmax (x)", 8 * N * 8),
        ("z = Reshape (x, flat)", 1),
        ("z = Shape (x)", 1),
        ("z = Gather (w, ids)", N * 8),
        ("a, z = Split <axis: int = 1, num_outputs: int = 2> (x)", N * 8),
        ("z = ReduceMean <keepdims: int = 0> (x, axis)", N * 8),
        ("a, z = TopK (x, axis)", 8 * N * 8),
        ("z = MatMul (x, w)", 2 * N * 8 * 8),
        ("t = Transpose (x) z = MatMul (y, t)", 2 * M * N * 8),
        ("z = Gemm <transA: int = 1> (x, x)", 2 * 8 * 8 * N),
        ("z = Gemm <transB: int = 1> (x, y)", 2 * N * M * 8),
        ('z = Einsum <equation: string = "nd,md->nm"> (x, y)', 2 * N * M * 8),
        ("z = Conv (c, kernel)", 2 * (5 * N) * 4),
        ("h, z = GRU <hidden_size: int = 2> (s, gates, recurrent)", 2 * 1 * N * (6 * 8 + 6 * 2)),
        ("z = other.Fancy (x, w)", 0),
    ],
)
def test_work_of_a_node(body: str, work: int) -> None:
    ones = lambda n: ", ".join(["1"] * n)  # noqa: E731
    weights = (
        f"float[8, 8] w = {{{ones(64)}}}, float[5, 4, 1] kernel = {{{ones(20)}}}, int64[1] flat = {{-1}}, "
        f"int64[1] axis = {{1}}, float[1, 6, 8] gates = {{{ones(48)}}}, float[1, 6, 2] recurrent = {{{ones(12)}}}"
    )
    sizes, node = sizes_of(body, weights)
    # An unknown operator: as large as its largest input, each element a product along the first input's last axis.
    assert sizes.work(node) == (work or 2 * (N * 8) * 8)


def test_work_of_control_flow_is_the_work_of_its_bodies() -> None:
    branches = """then_branch = a () => (float[N, 8] p) { q = Exp (x) p = Add (q, x) },
                  else_branch = b () => (float[N, 8] r) { r = Neg (x) }"""
    sizes, node = sizes_of(f"z = If (flag) <{branches}>")
    assert sizes.work(node) == (8 + 1 + 1) * N * 8
    body = "body = each (float[8] k, float[8] row) => (float[8] k2, float[8] out) { k2 = Add (k, row) out = Exp (k2) }"
    sizes, node = sizes_of(
        f"k, z = Scan <num_scan_inputs: int = 1, {body}> (start, x)", "float[8] start = {0,0,0,0,0,0,0,0}"
    )
    assert sizes.work(node) == N * (8 + 8 * 8)


def test_work_of_the_operator_counts_average_histories() -> None:
    case = attention_graph("absorbed", d=32, heads=4)
    node = next(n for n in case.model.graph.node if n.op_type == "TargetHistoryAttention")
    for requests in (1, 4):
        workload = {"N_h": 1000, "N_t": 30, "B": requests, "B_plus_1": requests + 1}
        sizes = NominalSizes(case.model, workload)
        assert sizes.work(node) == 30 * 4 * (1000 // requests) * (4 * 32 + 8)
        assert sizes.shape("attended") == (30, 4, 32)
        assert sizes.dims("attended") == ("N_t", 4, 32)
        assert not sizes.guesses


@pytest.mark.parametrize(
    ("element_type", "bits"),
    [
        (TensorProto.BOOL, 8),
        (TensorProto.BFLOAT16, 16),
        (TensorProto.FLOAT8E4M3FN, 8),
        (TensorProto.INT64, 64),
        (TensorProto.INT4, 4),
        (TensorProto.STRING, None),
        (TensorProto.UNDEFINED, None),
    ],
)
def test_bits_of_an_element(element_type: int, bits: int | None) -> None:
    assert element_bits(element_type) == bits


def test_bytes_and_symbolic_shapes() -> None:
    sizes, _ = sizes_of("h = Cast <to: int = 10> (x) t = Transpose (h) n = NonZero (x) t2 = other.Fancy (x)")
    assert (sizes.bytes("h"), sizes.dims("t"), sizes.shape("t")) == (N * 8 * 2, (8, "N"), (8, N))
    assert (sizes.bytes("x"), sizes.bytes("ids"), sizes.bytes("flag")) == (N * 8 * 4, N * 8, 1)
    assert sizes.guesses == ["n", "t2"]
    assert sizes.bytes("n") == N * 8 * 8  # as many elements as its input
    assert sizes.bytes("t2") is None  # not even the type is known


def test_a_size_that_was_made_a_vector_is_followed() -> None:
    """PyTorch's exporter writes `x[:, :1].expand(len(ids), 8)` so."""
    body = """size = Shape (ids) n = Squeeze (size, first) one_of = Reshape (n, one)
              to = Concat <axis: int = 0> (one_of, wide) z = Expand (v, to)"""
    values = "float[1] v = {1}, int64[1] first = {0}, int64[1] one = {-1}, int64[1] wide = {8}"
    sizes, _ = sizes_of(body, values)
    assert (sizes.dims("z"), sizes.shape("z"), sizes.guesses) == (("N", 8), (N, 8), [])


def test_an_unknown_size_of_an_input_is_named() -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[N, T] x) => (float[N, T] y) { y = Exp (x) }'
    )
    with pytest.raises(SplitError, match="dimension 1 of input 'x' has no nominal size; give one for 'T'"):
        NominalSizes(model, {"N": 3})


def test_weights_are_left_out_but_shapes_are_kept() -> None:
    case = attention_graph("projected", d=64)
    light = without_weights(case.model)
    assert light.ByteSize() < case.model.ByteSize() / 4
    assert {"table", "to_model"} <= {i.name for i in light.graph.input}
    assert {"by_head", "rows"} <= {t.name for t in light.graph.initializer}
    onnx.checker.check_model(light, full_check=True)
    assert helper.make_tensor_type_proto(TensorProto.FLOAT, [50, 64]) == next(
        i.type for i in light.graph.input if i.name == "table"
    )


def test_a_shape_that_was_measured_takes_the_place_of_a_guess():
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[N_t, 4] x) => (float[r] y) '
        "{ n = NonZero(x) y = Cast<to=1>(n) }"
    )
    measured = {"n": (2, "N_t"), "y": (2, None)}
    sizes = NominalSizes(model, {"N_t": 30}, measured)
    assert sizes.shape("n") == (2, 30)
    assert sizes.guesses == ["y"], "a size without a name stays a guess"
    assert sizes.dims("n") is not None
