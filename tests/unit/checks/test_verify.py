"""The proof must fail when, and only where, the numbers are wrong; and its report is what scripts parse."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
from onnx import numpy_helper
from support import tiny
from support.errors import one_line

from stca import probe
from stca.bundle import Bundle, seal, sha256_of
from stca.checks.asked import Asked
from stca.checks.tolerance import StageParity, Tolerance, compare
from stca.checks.verify import ParityReport, prove, verify
from stca.commands import main
from stca.errors import BundleError, ParityError
from stca.export.pipeline import split_onnx
from stca.export.reference.checkpoint import Checkpoint
from stca.manifest import MANIFEST, WEIGHTS, Manifest
from stca.runtime import Session

PROBES = (((20, 30),), ((5, 3), (0, 2), (1, 4)))
ONE = PROBES[:1]
STAGES = ["torch", "request_graph", "joined_halves", "session"]


@pytest.fixture
def copy(tmp_path, bundle_dir):
    shutil.copytree(bundle_dir, tmp_path / "B")
    return tmp_path / "B"


def rewrite(root, graph, change):
    """Give `graph` its own, changed copy of its weights, and seal the bundle again."""
    model = onnx.load(root / f"{graph}.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = change(tensor.name, numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    (root / f"{graph}.onnx").write_bytes(model.SerializeToString())
    return reseal(root)


def reseal(root, **changes):
    return seal(root, dataclasses.replace(Manifest.from_json((root / MANIFEST).read_text()), **changes))


def failed(report):
    return [s.name for s in report.stages if not s.passed]


def nudge(name, by):
    return lambda n, x: x + by if n == name else x


@pytest.mark.parametrize("export", [("log", "absorbed"), ("log", "projected"), ("delta", "projected")], ids="-".join)
def test_a_sound_bundle_passes(exported, export):
    report = verify(Bundle.load(exported(*export)), probes=PROBES)
    assert report.passed
    assert [s.name for s in report.stages] == STAGES
    for stage in report.stages:
        assert stage.passed
        assert stage.against == "float64 torch"
        assert 0 < stage.max_abs <= stage.limit
        assert stage.max_abs < 1e-5
        assert stage.cosine > 1 - 1e-9
        assert stage.topk_overlap == 1.0
    torch_stage = report.stages[0]
    for stage in report.stages[1:]:
        floor = stage.limit - 2 * torch_stage.max_abs  # four roundings of the largest score, which is below 1
        assert 4 * 2.0**-23 * 0.2 < floor < 4 * 2.0**-23


def test_the_report_as_json(bundle_dir):
    """The shape the command line promises."""
    report = verify(Bundle.load(bundle_dir), probes=ONE)
    raw = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert raw["passed"] is True
    assert raw["weights"] == Bundle.load(bundle_dir).manifest.weights
    assert raw["precision"] == "float32"
    for stage in raw["stages"]:
        assert {"name", "against", "max_abs", "max_rel", "cosine", "topk_overlap", "limit", "passed"} <= stage.keys()
        assert all(isinstance(stage[k], float) for k in ("max_abs", "max_rel", "cosine", "topk_overlap"))


def test_seeds_repeat_and_differ(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    first, again, other = (verify(bundle, probes=ONE, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_default_probes_fit_the_bundles_window(bundle_dir):
    """Longest history served: 32 tokens. Some probes ask for more."""
    told = []
    report = prove(Bundle.load(bundle_dir), progress=told.append)
    assert report["passed"]
    assert len(told) == 1 + len(STAGES)


def test_large_integers_are_left_out_where_the_model_itself_loses_them(bundle_dir):
    asked = Asked.of(Bundle.load(bundle_dir).manifest, ONE, 0, few_copies=False)
    most = [max(int(r["history_time"].max(initial=0)) for r in batch) for batch in asked.batches]
    assert most[-2] > probe.MODEST > max(most[:-2])
    right = [np.ones((sum(m), 1)) for m in asked.targets]
    assert not any(asked.beyond(i, right, right, "float32") for i, _ in asked.optional)
    wrong = [x * 1.01 for x in right]
    told = [why for i, why in asked.optional if asked.beyond(i, wrong, right, "float32")]
    assert len(told) == 1, "a batch with gaps is left out only where it has no scores"
    assert "history_time" in told[0]
    assert "--ids" in told[0]
    assert len(asked.without(-2).feeds) == len(asked.feeds) - 1


def test_what_the_model_itself_loses_is_not_the_graphs_fault():
    stage = StageParity("torch", "float64 torch", 0.1, 0.1, 1.0, 1.0, 0.01, passed=False)
    report = ParityReport(passed=False, weights="", precision="float32", reference="float64 torch", stages=(stage,))
    with one_line(ParityError, "stage torch", "the model's own scores", "--ids INPUT=N"):
        report.require(what_next="for the exported graph is not the model")


def test_a_changed_weight_in_the_scorer_fails_what_uses_the_scorer(copy):
    bundle = rewrite(copy, "target_scorer", nudge("task_out.bias", 1e-4))
    report = verify(bundle, probes=ONE)
    assert failed(report) == ["joined_halves", "session"]
    with one_line(ParityError, "joined_halves", "float64 torch", "limit"):
        report.require()
    with one_line(ParityError, "joined_halves"):
        prove(bundle)
    assert ParityError.exit_code == 1


def test_a_changed_weight_in_the_encoder_fails_what_uses_the_encoder(copy):
    report = verify(rewrite(copy, "user_encoder", nudge("history_in.bias", 1e-3)), probes=ONE)
    assert failed(report) == ["joined_halves", "session"]


def test_a_changed_weight_in_the_whole_graph_fails_it_alone(copy):
    report = verify(rewrite(copy, "request", nudge("task_out.bias", 1e-4)), probes=ONE)
    assert failed(report) == ["request_graph"]


def test_a_small_error_is_an_error(copy):
    """Ten roundings of the largest score: no fixed loose tolerance would see it."""
    report = verify(rewrite(copy, "target_scorer", nudge("task_out.bias", 1e-5)), probes=ONE)
    assert failed(report) == ["joined_halves", "session"]


def test_a_wrong_order_is_an_error_though_the_distance_is_small(copy):
    """Top-k overlap: as many of the best ten as are among the reference's best ten."""
    report = verify(rewrite(copy, "target_scorer", lambda n, x: -x if n == "task_out.weight" else x), probes=ONE)
    assert failed(report) == ["joined_halves", "session"]
    assert next(s for s in report.stages if s.name == "session").topk_overlap < 1


def test_a_wrong_ranking_is_an_error_though_every_score_is_within_its_limit():
    """Two scores may each be off by less than the limit and yet change places by more than it."""
    reference = np.linspace(2.0, 1.0, 11)
    reference[10] = reference[9] - 0.015
    values = reference.copy()
    values[9], values[10] = reference[9] - 0.009, reference[10] + 0.009
    found = compare("stage", "reference", [values], [reference], [[11]], 1e-7, Tolerance(0.0, 0.01))
    assert found.max_abs < found.limit
    assert found.topk_overlap == 0.9
    assert not found.passed


def test_a_hit_that_differs_from_its_miss_by_one_rounding_is_an_error(bundle_dir, monkeypatch):
    score, seen = Session.score, set()

    def drifting(self, request):
        scores = score(self, request)
        again = id(request) in seen
        seen.add(id(request))
        return np.nextafter(scores, np.float32(2), dtype=np.float32) if again else scores

    monkeypatch.setattr(Session, "score", drifting)
    assert failed(verify(Bundle.load(bundle_dir), probes=ONE)) == ["session"]


def test_values_that_are_not_finite_fail(copy):
    report = verify(rewrite(copy, "target_scorer", nudge("task_out.bias", np.nan)), probes=ONE)
    assert failed(report) == ["joined_halves", "session"]
    with one_line(ParityError, "joined_halves"):
        report.require()
    json.dumps(report.as_dict(), allow_nan=False)  # strict parsers know no Infinity


def test_the_same_change_everywhere_is_another_model(copy):
    """All stages share the one weights file, the reference too: new weights are right weights."""
    weights = safetensors.torch.load_file(copy / WEIGHTS)
    safetensors.torch.save_file({n: w * 1.1 for n, w in weights.items()}, copy / WEIGHTS)
    assert verify(reseal(copy, weights=sha256_of(copy / WEIGHTS)), probes=ONE).passed


def test_against_the_module_it_was_exported_from(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    right, wrong = tiny.module(tiny.config()), tiny.module(tiny.config(), seed=1)
    assert verify(bundle, module=right, probes=ONE).passed
    report = verify(bundle, module=wrong, probes=ONE)
    assert failed(report) == STAGES[1:]


def test_saturated_scores_are_no_fault(tmp_path, bundle_dir):
    """A sure model: in float32 its best scores round to equal numbers, and equals have no order."""
    bundle = Bundle.load(bundle_dir)
    tensors = tiny.module(tiny.config()).state_dict()
    tensors["task_out.bias"] += 25
    module = Checkpoint(tiny.config(), tensors).build("absorbed")
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    shutil.copytree(bundle.path, tmp_path / "B")
    shutil.copy(tmp_path / "w.safetensors", tmp_path / "B" / WEIGHTS)
    report = verify(reseal(tmp_path / "B", weights=sha256_of(tmp_path / "B" / WEIGHTS)), module=module, probes=ONE)
    assert report.passed


def test_without_a_module_the_whole_graph_is_the_yardstick(tmp_path, bundle_dir):
    manifest = Bundle.load(bundle_dir).manifest
    scopes = {s.name: s.scope for s in manifest.graphs["request"].inputs}
    bundle = split_onnx(bundle_dir / "request.onnx", scopes, tmp_path / "B", prove=tiny.no_proof)
    report = verify(bundle, probes=ONE)
    assert report.passed
    assert [s.name for s in report.stages] == STAGES[1:]
    assert {s.against for s in report.stages} == {"float64 onnx.reference"}
    changed = rewrite(tmp_path / "B", "target_scorer", nudge("task_out.bias", 1e-4))
    assert failed(verify(changed, probes=ONE)) == ["joined_halves", "session"]


def test_every_output_is_compared(tmp_path):
    """A model with one output per task: the second one wrong in the scorer."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N_h, 4] u, float[N_t, 4] t) => (float[N_t] a, float[N_t] b)'
        " { h = MatMul (u, w) e = Tanh (h) s = ReduceSum <keepdims = 1> (e, ax0) p = Mul (t, s) "
        "a = ReduceSum <keepdims = 0> (p, ax1) q = Mul (p, two) b = ReduceSum <keepdims = 0> (q, ax1) }"
    )
    for name, value in (
        ("w", np.eye(4, dtype=np.float32)),
        ("two", np.full(4, 2, np.float32)),
        ("ax0", np.array([0])),
        ("ax1", np.array([1])),
    ):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {"u": "user", "t": "target"}, tmp_path / "B", prove=tiny.no_proof)
    probes = (((6, 5),),)
    assert verify(bundle, probes=probes).passed
    assert not verify(rewrite(tmp_path / "B", "target_scorer", nudge("two", 0.5)), probes=probes).passed


def test_a_request_that_the_model_itself_has_no_scores_for_is_left_out_and_told(tmp_path, capsys):
    """To most models the least id is no event; this one divides by it."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (int64[N_h] u, float[N_t] t) => (float[N_t] y)'
        " { f = Cast <to = 1> (u) r = Reciprocal (f) s = ReduceSum <keepdims = 0> (r) y = Mul (t, s) }"
    )
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {"u": "user", "t": "target"}, tmp_path / "B", prove=prove)
    assert main(["inspect", str(bundle.path)]) == main(["verify", str(bundle.path)]) == 0
    assert capsys.readouterr().out.count("left out: a request whose user inputs hold the least integer") == 2


def test_nothing_is_left_out_of_other_models(bundle_dir):
    assert verify(Bundle.load(bundle_dir)).left_out == ()


def test_an_attention_form_that_does_not_exist(copy):
    with one_line(BundleError, "'fused'"):
        verify(reseal(copy, attention="fused"))


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_tolerance_is_twice_the_yardstick_and_a_floor():
    eps = 2.0**-23
    reference = [np.array([0.5, -8.0]), np.array([])]
    assert Tolerance.of(0.25, reference, eps).limit == 0.5 + 4 * eps * 8
    assert Tolerance.of(0.0, reference, eps).limit == 4 * eps * 8
    assert Tolerance.of(1e-3, [np.zeros((0, 2))], eps).limit == 2e-3
    assert Tolerance.of(0.0, [], eps).limit == 0


def stage(**changes):
    values = {"name": "x", "against": "y", "max_abs": 1.0, "max_rel": 1.0, "cosine": 1.0, "topk_overlap": 1.0}
    return StageParity(**{**values, "limit": 2.0, "passed": True, **changes})


def test_require_names_the_first_stage_that_failed():
    sound, bad, overflow = stage(), stage(name="bad", max_abs=3.0, passed=False), stage(max_abs=math.inf, passed=False)
    assert ParityReport(True, "", "float32", "", (sound,)).require().passed
    with one_line(ParityError, "bad", "3", "2", "verify --json"):
        ParityReport(False, "", "float32", "", (sound, bad, stage(name="worse", passed=False))).require()
    with one_line(ParityError, "not finite", "float32", "earlier step"):
        ParityReport(False, "", "float32", "", (sound, overflow)).require()


def test_another_number_of_scores_is_told():
    with pytest.raises(ParityError, match="stage session gives 0 scores, reference gives 5"):
        compare("session", "reference", [np.zeros((0, 1))], [np.ones((5, 1))], [[5]], 1e-7, Tolerance(0.0, 0.01))
