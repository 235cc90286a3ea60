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

from stca import tensorrt_flavours
from stca.bundle import Bundle
from stca.engines import tensorrt_builder
from stca.engines.tensorrt_builder import (
    _explain,
    _look_into,
    _refit,
    _require_attention,
    _require_plugins,
    _target,
    main,
)
from stca.errors import BuildError
from stca.tensorrt_flavours import FLAVOURS, Job


@pytest.fixture
def job(bundle_dir, tmp_path):
    bundle = Bundle.load(bundle_dir)
    return Job(
        flavour="tensorrt",
        graph=str(bundle.file("target_scorer")),
        state=[s.name for s in bundle.manifest.state],
        precision="bf16",
        lowering="quick",
        profiles=[{"N_h": [1, 32, 32], "N_t": [1, 8, 8], "B": [1, 2, 2], "B_plus_1": [2, 3, 3]}],
        sm=90,
        refit="weights",
        requests=2,
        plan=str(tmp_path / "plan"),
        refit_from=str(tmp_path / "old"),
    )


@pytest.mark.skipif(nvidia_bindings.missing() is not None, reason=nvidia_bindings.missing() or "")
@pytest.mark.parametrize(
    ("attention", "half", "words"),
    [
        ("fused", "target_scorer", ("tensorrt 11", "no builder")),
        ("plugin", "user_encoder", ("tensorrt 11", "no builder")),
        ("quick", "user_encoder", ("tensorrt 11", "no builder")),
        (
            "quick",
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
        tensorrt_builder._build(dataclasses.replace(job, graph=graph, lowering=attention, refit_from=None))


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
        ("plugin", {"PLUGIN_V3": 2}, True),
        ("quick", {"PLUGIN_V3": 4}, True),
        ("quick", {"SOFTMAX": 2}, False),
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
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector, device_memory_size_v2=4096)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine if layers is not None else None)
    return SimpleNamespace(Runtime=lambda _: runtime, LayerInformationFormat=SimpleNamespace(JSON=0))


def test_an_engine_without_its_plugins_is_refused():
    ours = [{"Name": "a", "PluginType": "TargetHistoryAttentionTied"}, "node_TargetHistoryAttention", {"Name": "gemm"}]
    told = _look_into(inspected(ours), None, b"", "quick")
    assert told == {"layers": ours, "device_memory": 4096}
    _require_plugins(told["layers"], 2)
    with one_line(BuildError, "2 attentions", "1 of our plugins"):
        _require_plugins(ours[:1], 2)
    with one_line(BuildError, "cannot be loaded"):
        _look_into(inspected(None), None, b"", "plugin")


def test_what_the_builder_said(job):
    said = "Attention operation was not supported by a dedicated kernel.\n (See https://…)"
    assert "no fused attention for this head size in bf16" in _explain(job, [said])
    assert "cannot build it: x y" in _explain(job, ["x\n  y", "z"])
    assert "nothing" in _explain(job, [])
    assert "only where there is a GPU" in _explain(job, ["CHECK(status == CUDA_SUCCESS) failed."])


class FakeRefitter:
    """TensorRT's refitter and its ONNX refitter over a stand-in engine; reads weights where it is told they are."""

    __version__ = "11.4.0.106"

    SerializationFlag = SimpleNamespace(INCLUDE_REFIT="INCLUDE_REFIT", EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, missing=(), done=True, loads=True, takes=True):
        self.missing, self.done, self.loads, self.takes, self.given, self.order = missing, done, loads, takes, {}, []

    def Runtime(self, log):
        def deserialize(plan):
            self.order.append("deserialize")
            flags = {"EXCLUDE_WEIGHTS"}
            config = SimpleNamespace(set_flag=flags.add, clear_flag=flags.discard)

            def serialize(given):
                assert given is config
                assert flags == {"INCLUDE_REFIT"}  # or the next refit is refused
                return b"refitted"

            made = SimpleNamespace(create_serialization_config=lambda: config, serialize_with_config=serialize)
            return made if self.loads else None

        log.log(self.ILogger.ERROR, "driver is too old")
        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def Refitter(self, engine, log):
        return SimpleNamespace(get_missing_weights=lambda: self.missing, refit_cuda_engine=lambda: self.done)

    def OnnxParserRefitter(self, refitter, log):
        def load(text):
            self.model = onnx.load_from_string(text)
            return True

        def give(name, address, size):
            tensor = next(t for t in self.model.graph.initializer if t.name == name)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            assert size == np.prod(tensor.dims) * dtype.itemsize
            self.given[name] = np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).copy()
            return True

        return SimpleNamespace(
            load_model_proto=load,
            load_initializer=give,
            refit_model_proto=lambda: self.takes,
            num_errors=1,
            get_error=lambda _: SimpleNamespace(desc=lambda: "no such\nweight"),
        )


def refitted(job, monkeypatch, attention="decomposed", **fake):
    Path(job.refit_from).write_bytes(b"old")
    trt = FakeRefitter(**fake)
    monkeypatch.setattr(tensorrt_builder, "load", lambda _: trt)
    monkeypatch.setattr(tensorrt_builder, "device_sm", lambda: 90)
    return trt, _refit(dataclasses.replace(job, lowering=attention))


@pytest.mark.parametrize("attention", ["fused", "decomposed"])
def test_new_weights_go_into_the_graph_the_engine_was_built_from(job, monkeypatch, attention):
    trt, built = refitted(job, monkeypatch, attention)
    assert Path(job.plan).read_bytes() == b"refitted"
    assert (built.version, built.sm) == ("11.4.0.106", 90)
    assert ("Attention" in {n.op_type for n in trt.model.graph.node}) == (attention == "fused")
    true = {t.name: numpy_helper.to_array(t) for t in onnx.load(job.graph).graph.initializer}
    external = [t.name for t in onnx.load(job.graph, load_external_data=False).graph.initializer if t.external_data]
    assert set(trt.given) == set(external)
    low, wide = trt.given["layers.0.out.weight"], trt.given["task_out.weight"]
    assert low.dtype == ml_dtypes.bfloat16
    assert np.array_equal(low, true["layers.0.out.weight"].reshape(-1).astype(ml_dtypes.bfloat16))
    assert wide.dtype == np.float32  # the score head
    assert np.array_equal(wide, true["task_out.weight"].reshape(-1))


def test_plugins_are_registered_before_a_plan_that_needs_them_is_loaded(job, monkeypatch):
    """The encoder has none; were it the scorer, the plan would not load without."""
    encoder = dataclasses.replace(job, graph=str(Path(job.graph).with_name("user_encoder.onnx")))
    order = []

    def register(name):
        order.append(name)
        return SimpleNamespace(settings=SimpleNamespace())

    monkeypatch.setattr(tensorrt_builder.importlib, "import_module", register)
    trt, _ = refitted(dataclasses.replace(encoder, requests=1), monkeypatch, "quick")
    assert order + trt.order == ["stca.plugins.tensorrt_plugin", "deserialize"]


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"missing": ["folded"]}, ("'folded'", "build it anew")),
        ({"done": False}, ("cannot refit", "driver is too old")),
        ({"loads": False}, ("cannot load", "driver is too old")),
        ({"takes": False}, ("does not take", "no such weight", "build it anew")),
    ],
)
def test_a_refit_that_fails(job, monkeypatch, fake, words):
    with one_line(BuildError, *words):
        refitted(job, monkeypatch, **fake)
    assert not Path(job.plan).exists()


def test_a_plan_for_another_gpu_is_not_refitted(job, monkeypatch):
    monkeypatch.setattr(tensorrt_builder, "load", lambda _: FakeRefitter())
    monkeypatch.setattr(tensorrt_builder, "device_sm", lambda: 89)
    with one_line(BuildError, "SM 89", "SM 90"):
        _refit(job)


def test_what_a_plugin_says_reaches_the_error(job, monkeypatch, tmp_path):
    """TensorRT tells only that one failed; the library's own words are on stderr."""
    child = tmp_path / "child"
    child.write_text(
        "#!/bin/sh\necho noise\necho 'stca::Op: offsets must be INT32' >&2\n"
        'for reply; do :; done\necho \'{"error": "the parser refuses it"}\' > "$reply"\n'
    )
    child.chmod(0o700)
    monkeypatch.setattr(tensorrt_flavours.sys, "executable", str(child))
    with one_line(BuildError, "the parser refuses it; stca::Op: offsets must be INT32"):
        tensorrt_flavours.build_plan(job, lambda _: None)


def test_errors_go_into_the_reply(job, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tensorrt_builder, "load", lambda _: FakeRefitter(loads=False))
    monkeypatch.setattr(tensorrt_builder, "device_sm", lambda: 90)
    job = dataclasses.replace(job, lowering="decomposed")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "job").write_text(json.dumps(dataclasses.asdict(job)))
    assert main([str(tmp_path / "job"), str(tmp_path / "reply")]) == 2
    assert "cannot load" in json.loads((tmp_path / "reply").read_text())["error"]
