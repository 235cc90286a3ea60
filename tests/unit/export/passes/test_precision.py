"""A float32 graph in a low precision: which values change type, which must not, and what does not fit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper, parser, shape_inference
from onnx.reference import ReferenceEvaluator
from support.errors import one_line

from stca.bundle import Bundle
from stca.errors import ExportError
from stca.export.passes.precision import PRECISIONS, cast_weight, to_precision
from stca.plugins import onnx_function

LOW = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}


def types(model: onnx.ModelProto) -> dict[str, int]:
    onnx_function.register_schema()
    graph = shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return found | {t.name: t.data_type for t in graph.initializer}


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("form", ["projected", "absorbed"])
@pytest.mark.parametrize("half", ["user_encoder", "target_scorer"])
def test_a_half_of_the_model(exported, precision, half, form):
    bundle = Bundle.load(exported("log", form))
    state = {s.name: s.dtype for s in bundle.manifest.state}
    own = onnx.load(bundle.file(half))
    before, model = types(own), to_precision(own, precision, state)
    onnx.checker.check_model(model, full_check=True)
    after = types(model)
    for value in (*model.graph.input, *model.graph.output):
        wanted = LOW[precision] if state.get(value.name) == "float32" else before[value.name]
        assert value.type.tensor_type.elem_type == wanted, value.name
    for name, kind in before.items():
        assert (after[name] == kind) or (kind == TensorProto.FLOAT and after[name] == LOW[precision]), name
    low = [n for n in before if before[n] == TensorProto.FLOAT and after[n] == LOW[precision]]
    assert len(low) > 0.8 * sum(kind == TensorProto.FLOAT for kind in before.values())
    if half == "target_scorer":  # the score head, and it alone, stays wide
        wide = {n.op_type for n in model.graph.node if after[n.output[0]] == TensorProto.FLOAT}
        assert wide == {"Cast", "MatMul", "Add", "Sigmoid"}
        assert after["task_out.weight"] == TensorProto.FLOAT
        assert after["summary_in.weight"] == LOW[precision]


@pytest.mark.parametrize(
    ("equation", "shapes", "products"),
    [
        ("thd,chd->thc", [(5, 3, 4), (7, 3, 4)], 1),
        ("thc,chd->thd", [(5, 3, 7), (7, 3, 4)], 1),
        ("ab,bc->ca", [(5, 3), (3, 4)], 1),
        ("ba, bc -> ca", [(3, 5), (3, 4)], 1),
        ("abc,bcd->ad", [(2, 3, 4), (3, 4, 5)], 0),  # two summed labels: stays an Einsum, in float32
        ("ab,ab->a", [(2, 3), (2, 3)], 0),
        ("ii,ij->j", [(3, 3), (3, 4)], 0),
        ("ab,cb->a", [(2, 3), (4, 3)], 0),
    ],
)
def test_an_einsum_that_bfloat16_has_not(rng, equation, shapes, products):
    inputs = ", ".join(f"float[{', '.join(map(str, s))}] x{i}" for i, s in enumerate(shapes))
    labels = equation.split("->")[0].replace(",", "").replace(" ", "")
    sizes = dict(zip(labels, [n for s in shapes for n in s], strict=True))
    out = ", ".join(str(sizes[c]) for c in equation.split("->")[1].strip())
    body = f'e = Einsum <equation = "{equation}"> (x0, x1) y = Abs (e)'
    model = small(body, f"float[{out}] y", inputs)
    low = to_precision(model, "bf16", ())
    onnx.checker.check_model(low, full_check=True)
    assert [n.op_type for n in low.graph.node].count("MatMul") == products
    feeds = {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    near, true = (ReferenceEvaluator(m).run(None, feeds)[0] for m in (low, model))
    np.testing.assert_allclose(near, true, rtol=0, atol=2**-6 * np.abs(true).max())


def test_float32_is_a_copy(bundle_dir):
    own = onnx.load(Bundle.load(bundle_dir).file("request"))
    same = to_precision(own, "fp32", ())
    assert same == own
    assert same is not own


def small(body: str, outputs: str = "float[n, 3] y", inputs: str = "float[n, 3] x", extra: str = "") -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> g ({inputs}) => ({outputs}) {extra} {{ {body} }}'
    )


def test_inputs_and_outputs_keep_their_type_and_state_does_not():
    model = to_precision(small("s = Neg (x) y = Abs (s)", "float[n, 3] s, float[n, 3] y"), "fp16", {"s"})
    kinds = types(model)
    assert (kinds["x"], kinds["s"], kinds["y"]) == (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT)
    out = ReferenceEvaluator(model).run(None, {"x": np.full((1, 3), 1 / 3, np.float32)})
    assert out[0].dtype == np.float16
    assert out[1].tolist() == [[float(np.float16(1 / 3))] * 3]


def test_softmax_computes_wide():
    model = to_precision(small("a = Mul (x, x) b = Softmax (a) y = Abs (b)"), "fp16", ())
    assert types(model)["b"] == TensorProto.FLOAT
    session = ort.InferenceSession(model.SerializeToString())
    # exp(60) is beyond float16, and the softmax of it is not
    assert np.allclose(session.run(None, {"x": np.array([[7.7, 0, 0]], np.float32)})[0], [[1, 0, 0]])


def test_what_is_added_to_logits_stays_float32():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18, "stca": 1]>
        g (float[t,1,16] q, float[h,1,16] k, int32[b] o, int32[s] s, int32[n] l, float[n] w) => (float[t,1,16] y) {
            bias = Tanh (w)
            y = stca.TargetHistoryAttention <scale: float = 1.0> (q, k, k, o, s, l, o, bias)
        }"""
    )
    onnx_function.attach(model)
    for precision, low in PRECISIONS.items():
        made = shape_inference.infer_shapes(to_precision(model, precision, ["k"]), check_type=True)
        (node,) = (node for node in made.graph.node if node.op_type == "TargetHistoryAttention")
        kinds = [types(made)[name] for name in (node.input[0], node.input[1], node.input[7])]
        assert kinds == [low, low, TensorProto.FLOAT]


def test_constants_and_casts_follow():
    model = to_precision(
        small(
            "i = Constant <value_ints = [1, 2, 3]> () f = Cast <to: int = 1> (i) "
            "c = Constant <value_float: float = -1.0e9> () s = Add (f, c) m = Add (x, s) y = Abs (m)"
        ),
        "fp16",
        (),
    )
    onnx.checker.check_model(model, full_check=True)
    (y,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((1, 3), np.float32)})
    assert np.isfinite(y).all()  # "minus a lot" stays a number


def run(model: onnx.ModelProto, **feeds: list) -> np.ndarray:
    """The first output by `onnx.reference`, which computes what the graph says."""
    onnx.checker.check_model(model, full_check=True)
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}
    (out, *_) = ReferenceEvaluator(model).run(None, {name: np.array(x, kinds[name]) for name, x in feeds.items()})
    return out


def constant(form: str, value: float) -> tuple[str, str]:
    """A scalar `c` as the text of a Constant node, or of an initializer."""
    return (f"c = Constant <value_float = {value}> ()", "") if form == "node" else ("", f"<float c = {{{value}}}>")


@pytest.mark.parametrize("form", ["node", "initializer"])
@pytest.mark.parametrize(("value", "says"), [(86400.0, "8.64e+04"), (-90000.0, "9e+04"), (1e9, "1e+09")])
def test_a_scalar_beyond_float16_is_refused(form, value, says):
    node, initializer = constant(form, value)
    model = small(f"{node} d = Div (x, c) e = Exp (d) y = Abs (e)", extra=initializer)
    with one_line(ExportError, "'c'", says, "float16", "bf16"):
        to_precision(model, "fp16", ())
    x = [[172800, 86400, 0]] if value == 86400 else [[0, 0, 0]]
    np.testing.assert_allclose(run(to_precision(model, "bf16", ()), x=x), run(model, x=x), rtol=0.02)


@pytest.mark.parametrize("form", ["node", "initializer"])
@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("value", [-1e9, -3.4028234e38])  # the second rounds to -inf in bfloat16
def test_minus_a_lot_stays_finite(precision, form, value):
    node, initializer = constant(form, value)
    inputs = "float[n, 3] x, bool[n, 3] seen"
    body = f"{node} k = Neg (x) m = Where (seen, k, c) w = Softmax (m) y = Abs (w)"
    model = to_precision(small(body, inputs=inputs, extra=initializer), precision, ())
    assert run(model, x=[[0, 0, 0]] * 2, seen=[[1, 1, 0], [0, 0, 0]]).round(2).tolist() == [
        [0.5, 0.5, 0.0],
        pytest.approx([1 / 3] * 3, abs=0.01),
    ]


@pytest.mark.parametrize("precision", LOW)
def test_a_mask_made_of_integers_stays_finite(precision):
    body = (
        "f = Cast <to: int = 1> (seen) one = Constant <value_float = 1.0> () c = Constant <value_float = -3.4e38> () "
        "off = Sub (one, f) m = Mul (off, c) k = Neg (x) s = Add (k, m) w = Softmax (s) y = Abs (w)"
    )
    model = to_precision(small(body, inputs="float[n, 3] x, int64[n, 3] seen"), precision, ())
    y = run(model, x=[[100, 100, 100]] * 2, seen=[[1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(y, [[0.5, 0.5, 0], [1 / 3] * 3], atol=0.01)


SQUARES = {"pow": "two = Constant <value_float = 2.0> () p = Pow (x, two)", "mul": "p = Mul (x, x)"}
ENDS = {
    "div": "r = Sqrt (v) n = Div (x, r)",
    "reciprocal": "s = Sqrt (v) r = Reciprocal (s) n = Mul (x, r)",
    "divided": "one = Constant <value_float = 1.0> () s = Sqrt (v) r = Div (one, s) n = Mul (r, x)",
}


@pytest.mark.parametrize("form", ["node", "initializer"])
@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("end", ENDS)
def test_a_decomposed_norm_in_float16(square, end, form):
    node, initializer = constant(form, 1e-14)  # of which float16 leaves nothing, and whose root's inverse is beyond it
    mean = f"{SQUARES[square]} m = ReduceMean <keepdims = 1> (p, axes)"
    body = f"{node} {mean} v = Add (m, c) {ENDS[end]} h = Mul (n, g) y = Abs (h)"
    axes = "int64[1] axes = {-1}, float[4] g = {1, 2, 3, 4}"
    extra = f"<{axes}, {initializer[1:-1]}>" if initializer else f"<{axes}>"
    model = small(body, "float[k, 4] y", "float[k, 4] x", extra)
    low = to_precision(model, "fp16", ())
    x = [[300, 200, 100, 50], [0, 0, 0, 0], [3e-4, 2e-4, 0, 1e-4]]
    np.testing.assert_allclose(run(low, x=x), run(model, x=x), rtol=2**-8, atol=1e-3)
    kinds = types(low)
    assert (kinds["n"], kinds["g"]) == (TensorProto.FLOAT16, TensorProto.FLOAT16)  # and no more than the norm is wide


def test_a_normalized_vector_in_float16():
    length = "l = ReduceL2 <keepdims = 1> (x, axes) b = Clip (l, c)"
    body = f"{length} s = Shape (x) e = Expand (b, s) n = Div (x, e) y = Abs (n)"
    model = small(body, extra="<int64[1] axes = {-1}, float c = {1e-12}>")
    x = [[3e4, 4e4, 5e4], [0, 0, 0]]
    np.testing.assert_allclose(run(to_precision(model, "fp16", ()), x=x), run(model, x=x), rtol=2**-9)


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (f, one) b = Log (a)",
        "a = Unsqueeze (f, axes) u = Squeeze (a, axes) b = Div (u, day)",
        "a = Concat <axis = 0> (f, f) l = Log (a) b = Slice (l, zeros, three)",
        "a = Sub (f, day) b = Sin (a)",
        "a = Div (f, day) l = Floor (a) i = Cast <to = 7> (l) b = Cast <to = 1> (i)",
        "h = Mod <fmod = 1> (f, day) b = Div (h, day)",
        "w = Greater (f, day) b = Cast <to = 1> (w)",
        "d = Cast <to = 11> (gap) h = Cast <to = 1> (d) b = Div (h, day)",
        "l = Neg (x) h = CastLike (gap, l) b = Div (h, day)",
    ],
)
@pytest.mark.parametrize("precision", LOW)
def test_integers_become_float32(body, precision):
    day = ", float day = {86400}" if "day" in body else ""
    constants = f"<float one = {{1}}{day}, int64[1] axes = {{0}}, int64[1] zeros = {{0}}, int64[1] three = {{3}}>"
    body = f"f = Cast <to = 1> (gap) {body} y = Abs (b)"
    model = small(body, "float[3] y", "int64[3] gap, float[3] x", constants)
    feeds = {"gap": [100_000, 1_750_000_001, 86_401], "x": [0, 0, 0]}
    (near, true) = (run(m, **feeds) for m in (to_precision(model, precision, ()), model))
    np.testing.assert_allclose(near, true, rtol=1e-6, atol=1e-6)


def test_flags_become_low():
    low = to_precision(
        small("f = Cast <to = 1> (b) m = Mul (x, f) y = Abs (m)", inputs="float[n, 3] x, bool[n, 3] b"), "fp16", ()
    )
    assert types(low)["f"] == TensorProto.FLOAT16


@pytest.mark.parametrize("form", ["node", "initializer"])
@pytest.mark.parametrize(
    ("value", "precision", "use"), [(1e-8, "fp16", "bf16"), (9e-8, "fp16", "bf16"), (1e-44, "bf16", "fp32")]
)
def test_a_scalar_that_loses_all_digits_is_refused(value, precision, use, form):
    node, initializer = constant(form, value)
    model = small(f"{node} s = Add (x, c) y = Abs (s)", extra=initializer)
    with one_line(ExportError, "'c'", f"{np.float32(value):.3g}", f"use {use}"):
        to_precision(model, precision, ())


@pytest.mark.parametrize("value", [0.0, 1e-5, -1e-6])
def test_a_scalar_that_keeps_a_digit_is_not(value):
    to_precision(small("s = Add (x, c) y = Abs (s)", extra=f"<float c = {{{value}}}>"), "fp16", ())


BOTH = "f = Cast <to = 1> (gap) a = Add (f, c) b = Log (a) k = Neg (x) s = Add (k, c) t = Add (b, s) y = Abs (t)"


@pytest.mark.parametrize("form", ["node", "initializer", "left out"])
def test_a_constant_with_wide_and_low_readers(form):
    for value in (1.0, 1e-8, 1e5):
        node, initializer = constant(form, value)
        model = small(f"{node} {BOTH}", "float[3] y", "int64[3] gap, float[3] x", initializer)
        weights = {}
        if form == "left out":
            (c,) = model.graph.initializer
            weights = {"c": numpy_helper.to_array(c)}
            c.ClearField("float_data")
        if value == 1:
            low = to_precision(model, "fp16", (), weights)
            assert types(low) | {"c": TensorProto.FLOAT, "c_low": TensorProto.FLOAT16} == types(low)
        else:
            with one_line(ExportError, "'c'", "use bf16"):
                to_precision(model, "fp16", (), weights)


def test_a_weight_beyond_float16_is_an_error_and_fits_bfloat16():
    model = small("s = Add (x, w) y = Abs (s)", extra="<float[3] w = {1, 70000, 3}>")
    with one_line(ExportError, "'w'", "7e+04", "bf16"):
        to_precision(model, "fp16", ())
    (w,) = (t for t in to_precision(model, "bf16", ()).graph.initializer)
    assert numpy_helper.to_array(w).astype(np.float32).tolist() == [1, float(ml_dtypes.bfloat16(70000)), 3]


def test_weights_outside_the_model_change_type_and_are_cast_when_they_are_read():
    model = small("s = Add (x, w) y = Abs (s)", extra="<float[3] w = {1, 2, 3}>")
    model.graph.initializer[0].ClearField("float_data")
    assert to_precision(model, "bf16", ()).graph.initializer[0].data_type == TensorProto.BFLOAT16
    values = np.array([1, 1 / 3], np.float32)
    assert cast_weight("w", values, PRECISIONS["bf16"]).dtype == ml_dtypes.bfloat16
    assert cast_weight("w", values, PRECISIONS["fp32"]) is values
    assert cast_weight("w", np.array([1, 2]), TensorProto.INT64).tolist() == [1, 2]
    assert np.isinf(cast_weight("w", np.array([np.inf], np.float32), PRECISIONS["fp16"])[0])
    assert cast_weight("w", np.array(-1e9, np.float32), PRECISIONS["fp16"]) == -65504
    for values in ([-1e9, 1], [-np.inf, 70000], [1e-8]):
        with one_line(ExportError, "'w'", "bf16"):
            cast_weight("w", np.array(values, np.float32), PRECISIONS["fp16"])


def test_a_float_captured_by_a_body_is_refused_where_types_would_meet():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (float[n, 3] x, bool c) => (float[n, 3] y)
        { y = If (c) < then_branch = t () => (float[n, 3] a) { a = Neg (x) },
                       else_branch = e () => (float[n, 3] b) { b = Abs (x) } > }"""
    )
    with one_line(ExportError, "'x'", "body"):
        to_precision(model, "fp16", ())


def test_a_value_without_a_type_is_refused():
    model = small("h = Unheard.Of (x) y = Neg (h)")
    model.opset_import.append(onnx.helper.make_opsetid("Unheard", 1))
    with one_line(ExportError, "'h'", "type"):
        to_precision(model, "bf16", ())
