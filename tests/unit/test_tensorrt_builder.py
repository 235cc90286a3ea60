"""The building process: what it asks of a library, and when it refuses to call something an engine."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import nvidia_bindings
from support.errors import one_line

from stca import tensorrt_builder
from stca.bundle import Bundle
from stca.errors import BuildError
from stca.tensorrt_builder import _explain, _refit, _require_attention, _require_plugin_in, _target, main
from stca.tensorrt_flavours import FLAVOURS, Job


@pytest.fixture
def job(bundle_dir, tmp_path):
    bundle = Bundle.load(bundle_dir)
    return Job(
        flavour="tensorrt",
        graph=str(bundle.file("target_scorer")),
        state=[s.name for s in bundle.manifest.state],
        precision="bf16",
        attention="plugin",
        profiles=[{"N_h": [1, 32, 32], "N_t": [1, 8, 8], "B": [1, 2, 2], "B_plus_1": [2, 3, 3]}],
        sm=90,
        refit="weights",
        plan=str(tmp_path / "plan"),
        refit_from=str(tmp_path / "old"),
    )


@pytest.mark.skipif(nvidia_bindings.missing() is not None, reason=nvidia_bindings.missing() or "")
@pytest.mark.parametrize(
    ("attention", "half", "words"),
    [
        ("fused", "target_scorer", ("tensorrt 11", "no builder")),
        ("plugin", "user_encoder", ("tensorrt 11", "no builder")),
        (
            "plugin",
            "target_scorer",
            ("head size D = 24", "16"),
        ),  # typed and folded, so that it gets as far as the kernels
    ],
)
def test_tensorrt_proper_up_to_its_builder(job, monkeypatch, attention, half, words):
    """NVIDIA's real bindings over a lean runtime: graph made, plugins registered, and then the builder is null."""
    monkeypatch.setattr(tensorrt_builder, "load", lambda _: nvidia_bindings.load())
    monkeypatch.setattr(tensorrt_builder, "device_sm", lambda: 90)
    graph = str(Path(job.graph).with_name(f"{half}.onnx"))
    with one_line(BuildError, *words):
        tensorrt_builder._build(dataclasses.replace(job, graph=graph, attention=attention, refit_from=None))


def test_which_sm():
    rtx = SimpleNamespace(
        __version__="1", ComputeCapability=SimpleNamespace(__members__=["NONE", "CURRENT", "SM120", "SM89"])
    )
    assert _target(rtx, FLAVOURS["tensorrt-rtx"], 89) == 89
    for sm, word in ((None, "not given"), (90, "no SM 90")):
        with one_line(BuildError, word, "89, 120"):
            _target(rtx, FLAVOURS["tensorrt-rtx"], sm)


def test_tensorrt_builds_for_the_gpu_it_runs_on(monkeypatch):
    monkeypatch.setattr(tensorrt_builder, "device_sm", lambda: 90)
    assert _target(None, FLAVOURS["tensorrt"], None) == _target(None, FLAVOURS["tensorrt"], 90) == 90
    with one_line(BuildError, "SM 90", "SM 89"):
        _target(None, FLAVOURS["tensorrt"], 89)


@pytest.mark.parametrize(
    ("attention", "layers", "fine"),
    [
        ("fused", {"ATTENTION_INPUT": 2}, True),
        ("fused", {"ATTENTION_INPUT": 1, "SOFTMAX": 1}, False),
        ("plugin", {"PLUGIN_V3": 4}, True),
        ("plugin", {"SOFTMAX": 2}, False),
        ("decomposed", {"SOFTMAX": 2}, True),
    ],
)
def test_a_network_that_lost_its_attention_is_refused(attention, layers, fine):
    if fine:
        _require_attention(attention, 2, layers)
    else:
        with one_line(BuildError, "2 attentions"):
            _require_attention(attention, 2, layers)


def inspected(layers):
    inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": layers}))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector) if layers is not None else None
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
    return SimpleNamespace(Runtime=lambda _: runtime, LayerInformationFormat=SimpleNamespace(JSON=0))


def test_an_engine_without_its_plugins_is_refused():
    ours = [{"Name": "a", "PluginType": "TargetHistoryAttentionTied"}, "node_TargetHistoryAttention", {"Name": "gemm"}]
    _require_plugin_in(inspected(ours), None, b"", 2)
    with one_line(BuildError, "2 attentions", "1 of our plugins"):
        _require_plugin_in(inspected(ours[:1]), None, b"", 2)
    with one_line(BuildError, "cannot be loaded"):
        _require_plugin_in(inspected(None), None, b"", 2)


def test_what_the_builder_said(job):
    said = "Attention operation was not supported by a dedicated kernel.\n (See https://…)"
    assert "no fused attention for this head size in bf16" in _explain(job, [said])
    assert "cannot build it: x y" in _explain(job, ["x\n  y", "z"])
    assert "nothing" in _explain(job, [])
    assert "only where there is a GPU" in _explain(job, ["CHECK(status == CUDA_SUCCESS) failed."])


class FakeRefitter:
    """TensorRT's refitter over a stand-in engine; reads weights where it is told that they are."""

    __version__ = "11.4.0.106"
    float32, float16, bfloat16 = np.float32, np.float16, ml_dtypes.bfloat16

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, names, missing=(), done=True, loads=True):
        self.names, self.missing, self.done, self.loads, self.given = names, missing, done, loads, {}

    def Runtime(self, log):
        engine = SimpleNamespace(serialize=lambda: b"refitted") if self.loads else None
        log.log(self.ILogger.ERROR, "driver is too old")
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)

    def Weights(self, dtype, address, count):
        size = count * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).copy()

    def Refitter(self, engine, log):
        def give(name, values):
            self.given[name] = values
            return True

        return SimpleNamespace(
            get_all_weights=lambda: self.names,
            get_missing_weights=lambda: self.missing,
            set_named_weights=give,
            refit_cuda_engine=lambda: self.done,
        )


def refitted(job, monkeypatch, **fake):
    Path(job.refit_from).write_bytes(b"old")
    trt = FakeRefitter(["layers.0.out.weight", "task_out.weight", "a constant of TensorRT's"], **fake)
    monkeypatch.setattr(tensorrt_builder, "load", lambda _: trt)
    return trt, _refit(job)


def test_new_weights_go_in_by_name_and_in_the_engines_type(job, monkeypatch):
    trt, built = refitted(job, monkeypatch)
    assert Path(job.plan).read_bytes() == b"refitted"
    assert built.version == "11.4.0.106"
    true = {t.name: numpy_helper.to_array(t) for t in onnx.load(job.graph).graph.initializer}
    assert set(trt.given) == {"layers.0.out.weight", "task_out.weight"}
    low, wide = trt.given["layers.0.out.weight"], trt.given["task_out.weight"]
    assert low.dtype == ml_dtypes.bfloat16
    assert np.array_equal(low, true["layers.0.out.weight"].reshape(-1).astype(ml_dtypes.bfloat16))
    assert wide.dtype == np.float32  # the score head
    assert np.array_equal(wide, true["task_out.weight"].reshape(-1))


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"missing": ["folded"]}, ("'folded'", "build it anew")),
        ({"done": False}, ("cannot refit", "driver is too old")),
        ({"loads": False}, ("cannot load", "driver is too old")),
    ],
)
def test_a_refit_that_fails(job, monkeypatch, fake, words):
    with one_line(BuildError, *words):
        refitted(job, monkeypatch, **fake)


def test_errors_go_into_the_reply(job, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tensorrt_builder, "load", lambda _: FakeRefitter([], loads=False))
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "job").write_text(json.dumps(dataclasses.asdict(job)))
    assert main([str(tmp_path / "job"), str(tmp_path / "reply")]) == 2
    assert "cannot load" in json.loads((tmp_path / "reply").read_text())["error"]
