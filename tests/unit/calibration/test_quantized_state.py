"""A state in 8 bits: what is kept, how far off it is, and that every runtime makes the same of it."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support import tiny
from support.errors import one_line

from stca import probe
from stca.bundle import Bundle, seal
from stca.calibration.collectors import Collector
from stca.calibration.quantized_bundle import state_bytes, write_quantized
from stca.calibration.quantized_state import StateFormat, levels, quantizable, quantize
from stca.checks.trace_runs import TraceRuns
from stca.checks.verify import verify
from stca.errors import ParityError, StcaError
from stca.export.analysis.onnx_reference import reference_of
from stca.runtime import OnnxRuntimeEngine, Request, RequestBatch, Session
from stca.specs import StateSpec
from stca.trace import Traced

KINDS = ("int8", "fp8")
GRANULARITIES = ("token", "head", "channel", "tensor")
SPEC = StateSpec("x", "float32", ("N_h", 2, 8), 64)
RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.standard_normal((50, 2, 8)),
    "rows of all sizes": RNG.standard_normal((50, 2, 8)) * np.logspace(-3, 3, 50)[:, None, None],
    "outlier": np.where(RNG.random((50, 2, 8)) < 0.01, 1e4, 1.0) * RNG.standard_normal((50, 2, 8)),
    "zeros": np.zeros((50, 2, 8)),
    "denormal": RNG.standard_normal((50, 2, 8)) * 1e-40,
    "huge": RNG.uniform(-1, 1, (50, 2, 8)) * 1e37,
    "constant": np.full((50, 2, 8), -3.7),
    "empty": np.zeros((0, 2, 8)),
}


def format_of(x, kind, granularity):
    seen = Collector(granularity)
    seen.add(x if len(x) else np.ones((1, 2, 8), np.float32))
    return StateFormat(kind, granularity, seen.ranges("absmax", levels(kind)))


def halves(opset=18):
    """An encoder and a scorer that pass their input on."""

    def one(a, b):
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N_h", 2, 8]) for n in (a, b)]
        graph = helper.make_graph([helper.make_node("Neg", [a], [b], f"make_{b}")], "g", values[:1], values[1:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

    return one("given", "x"), one("x", "read")


def engines(models, tmp_path):
    for i, model in enumerate(models):
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, tmp_path / f"{i}.onnx")
        yield OnnxRuntimeEngine(tmp_path / f"{i}.onnx", threads=1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA)
def test_what_is_read_is_near_what_was_kept(tmp_path, name, kind, granularity):
    x = DATA[name].astype(np.float32)
    made = halves()
    format = format_of(x, kind, granularity)
    state = quantize(*made, [SPEC], {"x": format})
    encoder, scorer = engines(made, tmp_path)
    kept = encoder.run({"given": x})
    read = -scorer.run(kept)["read"].astype(np.float64)
    assert [s.name for s in state] == list(kept)
    magnitude = np.abs(x.astype(np.float64))
    axes = {"token": (2,), "head": (0, 2), "channel": (0,), "tensor": (0, 1, 2)}[granularity]
    # A token's scale is at least float16's least one, relative to the trace's largest range.
    least = 2.0**-14 * float(format.ranges.max()) if granularity == "token" else 0.0
    step = np.maximum(magnitude.max(axes, keepdims=True, initial=0.0), least) * (1 + 2.0**-10) / levels(kind)
    relative = 0.0 if kind == "int8" else 2.0**-4
    half = 0.5 if kind == "int8" else 2.0**-10
    floor = 2.0**-120  # of numbers below float32's least normal one
    assert (
        np.abs(read + x) <= np.maximum(half * step * 1.01, relative * magnitude * 1.001) + 2.0**-22 * magnitude + floor
    ).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_onnx_runtime_keeps_what_the_reference_keeps(tmp_path, kind, granularity):
    x = DATA["rows of all sizes"].astype(np.float32)
    made = halves()
    quantize(*made, [SPEC], {"x": format_of(x, kind, granularity)})
    encoder, scorer = engines(made, tmp_path)
    kept = encoder.run({"given": x})
    wanted = dict(zip(kept, reference_of(made[0]).run(None, {"given": x}), strict=True))
    for name, value in kept.items():
        assert np.asarray(value).view(np.uint8).tobytes() == np.asarray(wanted[name]).view(np.uint8).tobytes(), name
    (read,) = reference_of(made[1]).run(None, wanted)
    assert np.array_equal(scorer.run(kept)["read"], read)


def test_e4m3_is_e4m3(tmp_path):
    x = RNG.uniform(-400, 400, (50, 2, 8)).astype(np.float32)
    made = halves()
    quantize(*made, [SPEC], {"x": StateFormat("fp8", "tensor", np.full((1, 1), 448.0, np.float32))})
    encoder, _ = engines(made, tmp_path)
    assert np.array_equal(
        encoder.run({"given": x})["x_fp8"].view(np.uint8), (-x).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


def test_values_beyond_the_trace_are_cut_to_the_largest_level(tmp_path):
    x = np.full((3, 2, 8), 50.0, np.float32)
    for kind in KINDS:
        made = halves()
        quantize(*made, [SPEC], {"x": StateFormat(kind, "tensor", np.ones((1, 1), np.float32))})
        encoder, scorer = engines(made, tmp_path)
        assert scorer.run(encoder.run({"given": x}))["read"] == pytest.approx(1.0, abs=0.008)  # int8 has -128


def test_older_opsets_are_refused_by_name():
    with pytest.raises(StcaError, match="opset 17") as e:
        quantize(*halves(17), [SPEC], {"x": format_of(DATA["normal"], "int8", "token")})
    assert one_line(e.value)


def test_only_computed_float_tensors_are_quantized():
    specs = [
        SPEC,
        dataclasses.replace(SPEC, name="copy", input="history"),
        dataclasses.replace(SPEC, name="ids", dtype="int64"),
        dataclasses.replace(SPEC, name="narrow", shape=("N_h", 2)),
        dataclasses.replace(SPEC, name="open", shape=("N_h", "width")),
        dataclasses.replace(SPEC, name="flat", shape=("N_h",)),
    ]
    assert quantizable(specs) == (SPEC,)


def quantized(bundle, folder, kind, granularity):
    runs = TraceRuns(1)
    specs = bundle.manifest.graphs["request"].inputs
    traced = [Traced(probe.single(specs, 20, 4, np.random.default_rng(i))) for i in range(3)]
    seen = {s.name: Collector(granularity) for s in quantizable(bundle.manifest.state)}
    for state in runs.states(bundle, traced):
        for name, collector in seen.items():
            collector.add(state[name])
    formats = {n: StateFormat(kind, granularity, c.ranges("absmax", levels(kind))) for n, c in seen.items()}
    return write_quantized(bundle, formats, folder)


@pytest.fixture(params=["absorbed", "projected"])
def own(request, exported):
    return Bundle.load(exported("log", request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_serves_appends_and_batches_as_in_float32(tmp_path, own, kind):
    made = quantized(own, tmp_path / "q", kind, "token")
    assert Bundle.load(made.path).manifest.weights == own.manifest.weights
    assert state_bytes(made.manifest) < 0.35 * state_bytes(
        own.manifest
    )  # heads of 8: scales weigh more than in earnest
    exact, session = (Session.load(b.path, threads=1) for b in (own, made))
    specs = own.manifest.graphs["request"].inputs
    whole = [probe.single(specs, n, 4, np.random.default_rng(n)) for n in (30, 7, 0)]
    scores = [session.score(Request(r, f"u{i}", 1)) for i, r in enumerate(whole)]
    for r, found in zip(whole, scores, strict=True):
        assert found == pytest.approx(exact.score(Request(r)), abs=0.05 if kind == "fp8" else 0.01)
    for i, r in enumerate(whole):
        assert np.array_equal(session.score(Request(r, f"u{i}", 1)), scores[i])
    batch = session.score(RequestBatch(probe.pack(specs, whole)))
    assert batch == pytest.approx(np.concatenate(scores), abs=1e-4)
    tokens = [s.name for s in specs if s.scope == "user" and s.shape[:1] == ("N_h",)]
    first = {n: x[:20] if n in tokens else x for n, x in whole[0].items()}
    session.score(Request(first, "later", 1))
    assert session.append("later", {n: whole[0][n][20:] for n in tokens}, 2, after=1)
    targets = {s.name: whole[0][s.name] for s in specs if s.scope != "user" and s.name in whole[0]}
    assert session.score(Request(targets, "later", 2)) == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_knows_a_quantized_bundle_and_its_faults(tmp_path, own, kind):
    made = quantized(own, tmp_path / "q", kind, "token")
    report = verify(made, probes=(((0, 4),), ((9, 6),), ((30, 8), (0, 2), (3, 1)))).require()
    assert [s.name for s in report.stages] == [
        "torch",
        "request_graph",
        f"{kind} in float64",
        "joined_halves",
        "session",
    ]
    assert report.stages[2].max_abs > 10 * report.stages[1].max_abs
    scorer = onnx.load(made.file("target_scorer"))
    constants = [n for n in scorer.graph.node if n.op_type == "Constant" and n.name.startswith("quantization_constant")]
    for node in constants:
        node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(3 * onnx.numpy_helper.to_array(node.attribute[0].t)))
    onnx.save(scorer, made.file("target_scorer"))
    made = seal(made.path, made.manifest)
    with pytest.raises(ParityError, match="in float64"):
        verify(made, probes=(((9, 6),),)).require()


@pytest.mark.parametrize("granularity", GRANULARITIES[1:])
def test_ranges_of_the_trace_need_no_scales_in_the_state(tmp_path, own, granularity):
    made = quantized(own, tmp_path / "q", "int8", granularity)
    assert {s.dtype for s in made.manifest.state} == {"int8", "int32", "int64"}
    assert state_bytes(made.manifest) < 0.26 * state_bytes(own.manifest)
    verify(made, probes=(((9, 6),),)).require()


def test_tiny_is_what_these_tests_think_it_is(own):
    assert tiny.config().width // tiny.config().heads == 8
    assert all(s.shape[0] == "N_h" for s in quantizable(own.manifest.state))


def test_engines_and_other_weights_of_a_quantized_bundle(tmp_path, exported, checkpoint_file):
    from stca.checks.engines import verify_engine
    from stca.engines.build import build
    from stca.engines.refit import refit
    from stca.runtime.engine_choice import best_engine

    made = quantized(Bundle.load(exported("log", "projected")), tmp_path / "q", "int8", "token")
    build(made.path, engine="onnxruntime")
    bundle = Bundle.load(made.path)
    report = verify_engine(bundle, best_engine(bundle.manifest, only="onnxruntime"), probes=((20, 8),))
    assert [s.name for s in report.stages] == ["torch fp32", "int8 in float64", "onnxruntime fp32"]
    told: list[str] = []
    refit(made.path, checkpoint_file("log"), out=tmp_path / "r", progress=told.append)
    renewed = Bundle.load(tmp_path / "r").manifest
    assert renewed.quantization == {"state": made.manifest.quantization["state"]}
    assert renewed.state == made.manifest.state
    assert any("stca calibrate" in line for line in told)
