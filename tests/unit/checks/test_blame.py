"""Finding the node at fault: one wrong weight, and the node that reads it is named; right graphs are let be."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from support.errors import one_line

from stca.bundle import Bundle, seal
from stca.checks.blame import bisect
from stca.checks.engines import verify_engine
from stca.engines.build import build
from stca.errors import BuildError, ParityError
from stca.export.engine_graph import engine_graph
from stca.manifest import EngineEntry
from stca.runtime.engine_choice import Choice

HALVES = ("user_encoder", "target_scorer")


def graph_of(bundle, half, precision="fp32", attention="function"):
    state = [s.name for s in bundle.manifest.state]
    return engine_graph(bundle.file(half), state=state, precision=precision, lowering=attention)


def perturbed(model: onnx.ModelProto, weight: str, by: float = 1e-3) -> onnx.ModelProto:
    """One element of one weight off by a thousandth of the largest."""
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[1] += np.asarray(by * float(np.abs(values.astype(np.float32)).max())).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    return model


def readers(model: onnx.ModelProto, weight: str) -> list[str]:
    return [node.name for node in model.graph.node if weight in node.input]


@pytest.mark.parametrize("attention", ["function", "fused", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_right_graphs_pass(bundle_dir, precision, attention):
    bundle = Bundle.load(bundle_dir)
    for half in HALVES:
        assert bisect(bundle, half, graph_of(bundle, half, precision, attention), precision=precision) is None


@pytest.mark.parametrize(
    ("graph", "weight"),
    [
        ("user_encoder", "layers.1.history_ffn.gate.weight"),
        ("target_scorer", "layers.0.out.weight"),
        ("target_scorer", "query_norm.1.bias"),
        ("target_scorer", "mixer.1.weight_out"),
        ("request", "layers.1.history_norm.weight"),
    ],
)
def test_one_wrong_weight_names_its_node(bundle_dir, tmp_path, graph, weight):
    bundle = Bundle.load(bundle_dir)
    model = perturbed(onnx.load(bundle.file(graph)), weight)
    onnx.save(model, tmp_path / "built.onnx")
    found = bisect(bundle, graph, tmp_path / "built.onnx")
    assert [found.node] == readers(model, weight)
    assert found.error > found.limit
    assert all(word in str(found) for word in (graph, found.node, found.op_type, found.value))


def test_a_wrong_weight_of_a_lowered_graph_in_low_precision(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    graph = graph_of(bundle, "target_scorer", "fp16", "decomposed")
    wrong = {**graph.weights, "layers.0.out.weight": graph.weights["layers.0.out.weight"] * np.float32(1.2)}
    found = bisect(bundle, "target_scorer", dataclasses.replace(graph, weights=wrong), precision="fp16")
    assert [found.node] == readers(graph.model, "layers.0.out.weight")


def test_a_file_that_is_no_graph(bundle_dir, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no protobuf")
    with one_line(BuildError, "x.onnx"):
        bisect(Bundle.load(bundle_dir), "request", tmp_path / "x.onnx")


class ReferenceEngine:
    """A typed, lowered graph as TensorRT gets it, run by `onnx.reference`: the judge of what no engine here can run."""

    def __init__(self, graph):
        self.name, self._graph = "onnx.reference", graph.complete()
        self._evaluator = ReferenceEvaluator(self._graph)
        self.outputs = tuple(o.name for o in self._graph.graph.output)

    def run(self, inputs):
        feeds = {i.name: inputs[i.name] for i in self._graph.graph.input}
        if len(feeds.get("history_item", [1])) == 0:
            feeds = {n: np.zeros(1, x.dtype) if len(x) == 0 else x for n, x in feeds.items()}
        return dict(zip(self.outputs, self._evaluator.run(None, feeds), strict=True))


def choice(bundle, flavour, precision, attention="decomposed"):
    made = {"flavour": flavour, "precision": precision, "key": {"lowering": attention}}
    made["profiles"] = [{"N_h": [1, 20, 30], "N_t": [1, 9, 9]}]
    entries = {half: EngineEntry.of({"graph": half, "file": f"{half}.plan", **made}) for half in HALVES}
    return Choice(flavour, precision, entries, "asked for")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("time", "form"), [("log", "absorbed"), ("log", "projected")])
def test_typed_graphs_are_as_good_as_torch_in_that_precision(exported, time, form, precision):
    bundle = Bundle.load(exported(time, form))
    engines = {half: ReferenceEngine(graph_of(bundle, half, precision, "decomposed")) for half in HALVES}
    report = verify_engine(bundle, choice(bundle, "tensorrt-rtx", precision), engines=engines)
    torch, engine = report.stages
    assert (torch.name, engine.name) == (f"torch {precision}", f"tensorrt-rtx {precision}")
    assert engine.passed
    assert 0 < engine.max_abs <= engine.limit
    assert report.precision == precision


def test_engines_that_are_wrong_though_their_graphs_are_right(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    engines = {half: ReferenceEngine(graph_of(bundle, half, "fp32", "decomposed")) for half in HALVES}
    run = engines["target_scorer"].run
    engines["target_scorer"].run = lambda inputs: {n: x + np.float32(0.01) for n, x in run(inputs).items()}
    with one_line(ParityError, "tensorrt-rtx fp32", "0.01", "it is the engines"):
        verify_engine(bundle, choice(bundle, "tensorrt-rtx", "fp32"), engines=engines)


def test_behind_a_plugin_the_graph_is_bisected_with_the_function_body(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    engines = {half: ReferenceEngine(graph_of(bundle, half)) for half in HALVES}
    run = engines["target_scorer"].run
    engines["target_scorer"].run = lambda inputs: {n: -x for n, x in run(inputs).items()}
    asked = choice(bundle, "tensorrt", "fp32", "plugin")
    with one_line(ParityError, "it is the engines or a plugin"):
        verify_engine(bundle, asked, engines=engines)


def test_engines_are_asked_no_more_than_they_serve(bundle_dir):
    bundle, largest = Bundle.load(bundle_dir), {}
    engines = {half: ReferenceEngine(graph_of(bundle, half, "fp32", "decomposed")) for half in HALVES}
    run = engines["target_scorer"].run

    def counted(inputs):
        for name in ("target_item", "attention_0_history"):
            largest[name] = max(largest.get(name, 0), len(inputs[name]))
        return run(inputs)

    engines["target_scorer"].run = counted
    assert verify_engine(bundle, choice(bundle, "tensorrt-rtx", "fp32"), engines=engines).passed
    assert largest == {"target_item": 9, "attention_0_history": 30}


def test_a_wrong_weight_in_a_built_engine_is_found_and_its_node_named(bundle_dir, tmp_path):
    """The whole way: engines built into a bundle, one weight of one layer changed in a built graph, its node blamed."""
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    build(root, engine="onnxruntime", precision="fp16")
    bundle = Bundle.load(root)
    entries = {e.graph: e for e in bundle.manifest.engines}
    asked = Choice("onnxruntime", "fp16", entries, "asked for")
    assert verify_engine(bundle, asked).passed
    file = root / entries["target_scorer"].file
    model = perturbed(onnx.load(file), "layers.0.out.weight", by=2.0)
    file.with_suffix(".weights").unlink()
    onnx.save(model, file, save_as_external_data=True, location=file.with_suffix(".weights").name)
    seal(root, bundle.manifest)
    (node,) = readers(model, "layers.0.out.weight")
    with one_line(ParityError, "onnxruntime fp16", "target_scorer", repr(node)):
        verify_engine(Bundle.load(root), asked)


def test_without_a_torch_module_the_yardstick_is_as_strict(bundle_dir, tmp_path):
    """The same weights as if split from an ONNX file: the limit is of the same size, and a wrong weight is found."""
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    build(root, engine="onnxruntime", precision="fp16")
    bundle = Bundle.load(root)
    asked = Choice("onnxruntime", "fp16", {e.graph: e for e in bundle.manifest.engines}, "asked for")
    strict = verify_engine(bundle, asked).stages[1].limit
    foreign = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, model={"kind": "onnx"}))
    report = verify_engine(foreign, asked)
    assert report.stages[0].name == "onnx fp16"
    assert report.passed
    assert report.stages[1].limit < 3 * strict
    file = root / asked.entries["target_scorer"].file
    model = perturbed(onnx.load(file), "layers.0.out.weight", by=2.0)
    file.with_suffix(".weights").unlink()
    onnx.save(model, file, save_as_external_data=True, location=file.with_suffix(".weights").name)
    (node,) = readers(model, "layers.0.out.weight")
    with one_line(ParityError, "onnxruntime fp16", "target_scorer", repr(node)):
        verify_engine(foreign, asked)


def test_a_precision_that_loses_half_its_digits_is_no_yardstick(bundle_dir, monkeypatch):
    """Else engines might be off by twice as much, or by anything where it is not finite."""
    import stca.checks.engines

    bundle = Bundle.load(bundle_dir)
    engines = {half: ReferenceEngine(graph_of(bundle, half, "fp32", "decomposed")) for half in HALVES}
    real = stca.checks.engines.verify.run_torch
    for wrong in (np.float32(0.1), np.float32("nan")):

        def off(module, feeds, dtype, wrong=wrong):
            return [x + (wrong if dtype == "bfloat16" else 0) for x in real(module, feeds, dtype)]

        monkeypatch.setattr(stca.checks.engines.verify, "run_torch", off)
        with one_line(ParityError, "torch bf16 is itself off", "another precision"):
            verify_engine(bundle, choice(bundle, "tensorrt-rtx", "bf16"), engines=engines)
