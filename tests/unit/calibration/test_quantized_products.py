"""Products with matrices of int8: what they compute, that runtimes agree on it, and the search over them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.calibrating import command_on
from support.errors import one_line

from stca import commands, probe
from stca.bundle import Bundle, seal
from stca.calibration.calibrate import calibrate
from stca.calibration.choices import Options, weight_choices, with_ranges
from stca.calibration.quality import Budget
from stca.calibration.quantized_bundle import weights_bytes, write_quantized
from stca.calibration.quantized_products import ProductFormat, quantizable_products, quantize_products
from stca.calibration.quantized_weights import in_steps
from stca.checks.trace_runs import TraceRuns, tasks_of
from stca.checks.verify import prove, verify
from stca.engines.build import build
from stca.errors import ParityError, UsageError
from stca.examples import gallery
from stca.export.analysis.onnx_reference import reference_of
from stca.export.pipeline import export_module
from stca.runtime import OnnxRuntimeEngine, Request, RequestBatch, Session
from stca.specs import GROWER
from stca.trace import Traced

ACTIVATIONS = ("none", "token", "tensor")
RNG = np.random.default_rng(0)
A, B, C = (RNG.standard_normal(shape).astype(np.float32) for shape in ((32, 16), (32, 24), (8, 16)))


BIAS = RNG.standard_normal(8).astype(np.float32)


def model(opset=18):
    """`x · a`, `x · b` and, with its matrix the other way round, `Gemm(x · a, c)`."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "a"], ["ya"], "first"),
        node("MatMul", ["x", "b"], ["yb"], "second"),
        node("Gemm", ["ya", "c", "bias"], ["yc"], "third", transB=1),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", w])
        for n, w in zip(["x", "ya", "yb", "yc"], (32, 16, 24, 8), strict=True)
    ]
    weights = [numpy_helper.from_array(w, n) for n, w in (("a", A), ("b", B), ("c", C), ("bias", BIAS))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def changed(activations, largest=3.0, *, half=True):
    made = model()
    formats = dict.fromkeys("abc", ProductFormat(activations, {"x": largest, "ya": 30.0}))
    quantize_products(made, formats, half=half)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_onnx_runtime_computes_what_the_reference_computes(tmp_path, activations):
    x = RNG.standard_normal((50, 32)).astype(np.float32)
    x[7] = 0
    made = changed(activations)
    onnx.save(made, tmp_path / "m.onnx")
    wanted = reference_of(made).run(None, {"x": x})
    optimized = OnnxRuntimeEngine(tmp_path / "m.onnx", threads=1).run({"x": x})
    literal = OnnxRuntimeEngine(tmp_path / "m.onnx", threads=1, literal=True).run({"x": x})
    for found in (optimized, literal):
        for value, own in zip(found.values(), wanted, strict=True):
            np.testing.assert_allclose(value, own, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize(("activations", "half"), [("none", True), ("token", False), ("tensor", False)])
def test_weights_alone_are_off_by_half_a_step_of_their_column(activations, half):
    x = RNG.standard_normal((50, 32)).astype(np.float32)
    ya, yb, yc = reference_of(changed(activations, half=half)).run(None, {"x": x})
    for found, w in ((ya, A), (yb, B)):
        numbers, steps = in_steps(w, "int8", 0)
        np.testing.assert_allclose(found, x @ (numbers * steps), rtol=1e-5, atol=1e-5)
        assert (np.abs(found - x @ w) <= np.abs(x).sum(1, keepdims=True) * steps * 0.51).all()
    numbers, steps = in_steps(C, "int8", 1)
    np.testing.assert_allclose(yc, ya @ (numbers * steps).T + BIAS, rtol=1e-5, atol=1e-5)


def moved_model():
    """Products with a matrix that is turned first, with parts of another one, and with three matrices in one tensor."""
    node = helper.make_node
    nodes = [
        node("Transpose", ["turned"], ["turned_t"], perm=[1, 0]),
        node("MatMul", ["x", "turned_t"], ["y0"]),
        node("Split", ["parted"], ["p0", "p1"], axis=0, num_outputs=2),
        node("Transpose", ["p0"], ["p0_t"], perm=[1, 0]),
        node("Transpose", ["p1"], ["p1_t"], perm=[1, 0]),
        node("MatMul", ["x", "p0_t"], ["y1"]),
        node("MatMul", ["x", "p1_t"], ["y2"]),
        node("MatMul", ["x", "three"], ["y3"]),
        node("MatMul", ["first", "x_t"], ["y4"]),
        node("Transpose", ["x"], ["x_t"], perm=[1, 0]),
    ]
    nodes = [*nodes[:-2], nodes[-1], nodes[-2]]
    shapes = {"turned": (16, 32), "parted": (20, 32), "three": (3, 32, 8), "first": (9, 32)}
    weights = [numpy_helper.from_array(RNG.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])
    sizes = (["N", 16], ["N", 10], ["N", 10], [3, "N", 8], [9, "N"])
    made = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, s) for i, s in enumerate(sizes)]
    graph = helper.make_graph(nodes, "g", [given], made, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(("kind", "activations"), [("int8", "none"), ("fp8", "none"), ("int8", "token")])
def test_matrices_that_are_turned_parted_or_several_have_a_step_for_each_column(tmp_path, kind, activations):
    made = moved_model()
    weights = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    names = quantizable_products([made])
    assert names == ("turned", "parted", "three")
    quantize_products(made, dict.fromkeys(names, ProductFormat(activations, kind=kind)), half=True)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, tmp_path / "m.onnx")
    x = RNG.standard_normal((50, 32)).astype(np.float32)
    rounded = {}
    for name, shared in (("turned", 1), ("parted", 1), ("three", (0, 1))):
        numbers, steps = in_steps(weights[name], kind, shared)
        rounded[name] = numbers.astype(np.float32) * steps
    parts = rounded["parted"]
    wanted = (x @ rounded["turned"].T, x @ parts[:10].T, x @ parts[10:].T, x @ rounded["three"])
    for found in (
        reference_of(made).run(None, {"x": x}),
        OnnxRuntimeEngine(tmp_path / "m.onnx", threads=1).run({"x": x}).values(),
    ):
        for value, own in zip(found, wanted, strict=False):
            np.testing.assert_allclose(value, own, rtol=1e-5, atol=3e-5)


def test_rows_of_all_sizes_keep_their_digits_where_each_has_a_step():
    x = (RNG.standard_normal((50, 32)) * np.logspace(-6, 6, 50)[:, None]).astype(np.float32)
    (exact, *_), (found, *_) = (reference_of(m).run(None, {"x": x}) for m in (changed("none"), changed("token")))
    size = np.abs(x).max(1, keepdims=True) * np.abs(A).sum(0)
    assert (np.abs(found - exact) <= 0.51 / 127 * size).all()
    other = reference_of(changed("token")).run(None, {"x": x[20:30]})[0]
    np.testing.assert_allclose(other, found[20:30], rtol=1e-4)  # whatever comes together with a row


@pytest.mark.parametrize("activations", ACTIVATIONS[1:])
def test_a_gemm_keeps_its_sum_exact(activations):
    x = RNG.standard_normal((50, 32)).astype(np.float32)
    (ya, _, yc), exact = (reference_of(changed(a)).run(None, {"x": x}) for a in (activations, "none"))
    numbers, steps = in_steps(C, "int8", 1)
    wanted = ya @ (numbers * steps).T + BIAS
    largest = 30.0 if activations == "tensor" else np.abs(ya).max(1, keepdims=True)
    off = np.abs(yc - wanted)
    assert off.max() > 1e-4
    assert (off <= 0.51 / 127 * largest * np.abs(numbers * steps).sum(1) + 1e-4).all()
    assert np.abs(exact[2] - wanted).max() > 0


def test_what_is_beyond_the_trace_is_cut():
    x = np.full((1, 32), 5.0, np.float32)
    found = reference_of(changed("tensor", 1.0)).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, reference_of(changed("none")).run(None, {"x": x / 5})[0], rtol=0.02, atol=0.1)


def test_products_that_share_a_factor_are_integer_products_in_onnx_runtime(tmp_path):
    import onnxruntime

    for activations in ("token", "tensor"):
        made = model()
        del made.graph.node[2:], made.graph.output[2:]
        quantize_products(made, dict.fromkeys("ab", ProductFormat(activations, {"x": 3.0})), half=True)
        onnx.save(made, tmp_path / "m.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(tmp_path / "m.onnx", options)
        kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert kinds.count("MatMulIntegerToFloat") == 2, kinds


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.node.append(helper.make_node("Identity", ["a"], ["again"])),
        lambda g: g.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [32, 16])),
        lambda g: g.node.append(helper.make_node("MatMul", ["a", "d"], ["again"])),
        lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(A.astype(np.float64), "a")),
        lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(A[:4], "a")),
        lambda g: g.initializer[0].CopyFrom(numpy_helper.from_array(A[None], "a")),
    ],
)
def test_only_matrices_that_are_second_factors_alone_are_quantized(change):
    made = model()
    assert quantizable_products([made]) == ("a", "b", "c")
    change(made.graph)
    assert quantizable_products([model(), made]) == ("b", "c")


def test_a_matrix_that_is_not_finite_is_refused():
    made = model()
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((32, 16), np.inf, np.float32), "a"))
    with one_line(UsageError, "'a'", "not finite"):
        quantize_products(made, {"a": ProductFormat()}, half=False)


@pytest.fixture(scope="module")
def own(exported):
    return Bundle.load(exported("log", "projected"))


@pytest.fixture(scope="module")
def requests(own):
    specs, rng = own.manifest.graphs["request"].inputs, np.random.default_rng(0)
    return [Traced(probe.single(specs, 20, 30, rng)) for _ in range(10)]


def written(own, requests, folder, activations, kind="int8"):
    formats = dict(weight_choices(own, Options(None, weights=kind, activations=activations)))
    if activations == "tensor":
        formats |= with_ranges(own, formats, "absmax", TraceRuns(1), requests)
    return write_quantized(own, formats, folder)


@pytest.mark.parametrize(("activations", "kind"), [*((a, "int8") for a in ACTIVATIONS), ("none", "fp8")])
def test_a_bundle_is_proven_serves_and_appends(tmp_path, own, requests, activations, kind):
    made = Bundle.load(written(own, requests, tmp_path / "q", activations, kind).path)
    assert made.manifest.weights != own.manifest.weights
    assert weights_bytes(made.manifest) < 0.65 * weights_bytes(own.manifest)  # of a tiny model
    stages = [s.name for s in verify(made, probes=(((0, 4),), ((9, 6),), ((30, 8), (3, 1)))).require().stages]
    assert ("int8 in float64" in stages) == (activations != "none")
    exact, session = (Session.load(b.path, threads=1) for b in (own, made))
    specs = own.manifest.graphs["request"].inputs
    whole = [probe.single(specs, n, 4, np.random.default_rng(n)) for n in (30, 7)]
    scores = [session.score(Request(r, f"u{i}", 1)) for i, r in enumerate(whole)]
    assert 0 < max(np.abs(s - exact.score(Request(r))).max() for s, r in zip(scores, whole, strict=True)) < 0.2
    batch = session.score(RequestBatch(probe.pack(specs, whole)))
    np.testing.assert_allclose(batch, np.concatenate(scores), atol=1e-4)
    tokens = [s.name for s in specs if s.scope == "user" and s.shape[:1] == ("N_h",)]
    session.score(Request({n: x[:20] if n in tokens else x for n, x in whole[0].items()}, "later", 1))
    assert session.append("later", {n: whole[0][n][20:] for n in tokens}, 2, after=1)
    targets = {s.name: whole[0][s.name] for s in specs if s.scope != "user" and s.name in whole[0]}
    np.testing.assert_allclose(session.score(Request(targets, "later", 2)), scores[0], atol=1e-4)


@pytest.mark.parametrize(("activations", "stage"), [("none", "joined_halves"), ("tensor", "in float64")])
def test_scales_of_another_matrix_do_not_pass_the_proof(tmp_path, own, requests, activations, stage):
    made = written(own, requests, tmp_path / "q", activations)
    scorer = onnx.load(made.file("target_scorer"), load_external_data=False)
    nodes = {n.output[0]: n for n in scorer.graph.node if n.op_type == "DequantizeLinear"}
    for layer in (n.removesuffix("up.weight") for n in nodes if n.endswith(".up.weight")):
        one, other = (nodes[f"{layer}{name}.weight"] for name in ("up", "gate"))
        one.input[0], other.input[0] = other.input[0], one.input[0]
    onnx.save(scorer, made.file("target_scorer"))
    with pytest.raises(ParityError, match=stage):
        verify(seal(made.path, made.manifest), probes=(((9, 6),),)).require()


def test_sums_that_a_state_keeps_grow_with_the_same_matrices(tmp_path):
    model = gallery.load("two_tower")
    source = {"kind": "callable", "name": "two_tower"}
    own = export_module(model(), tmp_path / "own", prove=lambda *_: {}, source=source)
    assert any(s.append for s in own.manifest.state)
    made = written(own, [Traced(model.request(model.history, 8))], tmp_path / "q", "tensor")
    loaded = Bundle.load(made.path)
    verify(loaded, probes=(((9, 6),),)).require()
    assert loaded.manifest.state == own.manifest.state
    kinds = {n.op_type for n in onnx.load(loaded.file(GROWER), load_external_data=False).graph.node}
    assert "DequantizeLinear" in kinds


class Faked(TraceRuns):
    """Scores that move by so much for each matrix that is in 8 bits."""

    def __init__(self, **harm):
        super().__init__(1)
        self.harm = harm

    def scores(self, bundle, requests):
        told = (bundle.manifest.quantization or {}).get("weights", {}).get("tensors", ())
        moved = sum(x for name, x in self.harm.items() if name.replace("__", ".") in told)
        for i, scores in enumerate(super().scores(bundle, requests)):
            yield scores + moved * np.random.default_rng(i).standard_normal(scores.shape).astype(np.float32)


def search(own, requests, out, run, **options):
    return calibrate(
        own,
        lambda: requests,
        options=Options(**{"kind": None, "weights": "int8", **options}),
        budget=Budget.parse("top10=0.8"),
        out=out,
        run=run,
        tasks=tasks_of(own.manifest),
        prove=lambda _: {},
    )


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="needs tensorrt-rtx")
@pytest.mark.parametrize(("activations", "kind"), [("tensor", "int8"), ("none", "fp8")])
def test_tensorrt_rtx_builds_them_mixed_with_bfloat16(tmp_path, own, requests, activations, kind):
    made = written(own, requests, tmp_path / "q", activations, kind)
    built = build(made.path, engine="tensorrt-rtx", sm=89, precision="bf16")
    assert [entry["graph"] for entry in built] == ["user_encoder", "target_scorer"]


def test_matrices_that_move_the_scores_are_kept_and_named(tmp_path, own, requests):
    harm = {"layers__0__key__weight": 3.0, "target_in__weight": 2.0}
    made, found = search(own, requests, tmp_path / "q", Faked(**harm))
    assert {"layers.0.key.weight", "target_in.weight"} <= {*found.taken.high}
    assert not {*found.taken.high} & {*made.manifest.quantization["weights"]["tensors"]}
    assert found.tried[0].weights_ratio < found.taken.weights_ratio < 1
    assert {p.name for p in sorted(found.parts, key=lambda p: p.rms)[-2:]} == {
        "layers.0.key.weight",
        "target_in.weight",
    }
    assert all(p.saved > 0 and p.node.endswith("(MatMul)") for p in found.parts)


def test_what_cannot_be_asked_is_one_line(tmp_path, own, requests):
    with one_line(UsageError, "--activations token", "--weights int8"):
        search(own, requests, tmp_path / "q", TraceRuns(1), weights="fp8", activations="token")
    with one_line(UsageError, "--activations token", "add --weights int8"):
        search(own, requests, tmp_path / "q", TraceRuns(1), weights=None, kind="int8", activations="token")
    bad = [dataclasses.replace(requests[0], inputs={**requests[0].inputs, "target_item": [[1, 2]]}), *requests]
    with one_line(UsageError, "request 0: target_item"):
        search(own, bad, tmp_path / "q", TraceRuns(1), activations="tensor")
    names = weight_choices(own, Options(None, weights="int8"))
    with one_line(ParityError, "no tensor can be int8", "read by node", "(MatMul)"):
        search(own, requests, tmp_path / "q", Faked(**{n.replace(".", "__"): 9.0 for n in names}))


def test_the_command_searches_all_parts_under_one_budget(tmp_path, own, requests, capsys):
    argv = command_on(own, requests, tmp_path)
    argv += ["--precision", "int8", "--weights", "int8", "--activations", "tensor"]
    assert commands.main([*argv, "--out", str(tmp_path / "q"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parity"]["passed"]
    assert told["weights_bytes"]["int8"] < 0.65 * told["weights_bytes"]["float32"]
    found = Bundle.load(tmp_path / "q").manifest.quantization
    assert {*found["state"]["tensors"], *found["weights"]["tensors"]} == {*told["tried"][-1]["quantized"]}
    assert prove(Bundle.load(tmp_path / "q"))["passed"]
