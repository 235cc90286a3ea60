"""ONNX Runtime behind the engine's interface: what it cannot load or run is one line, never a silent fallback."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser
from support.errors import one_line

from stca.errors import BuildError, EngineError
from stca.runtime import OnnxRuntimeEngine
from stca.runtime.engine import scores_of


@pytest.fixture
def model(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[n, 2] a, int64[n] i) => (float[n, 2] b, int64[n] j)'
    file = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(text + " { b = Add (a, a) j = Identity (i) }"), file)
    return file


def test_outputs_by_name(model):
    engine = OnnxRuntimeEngine(model, threads=1)
    assert engine.outputs == ("b", "j")
    assert engine.name.startswith("onnxruntime ")
    assert "CPU" in engine.name
    out = engine.run({"a": np.ones((3, 2), np.float32), "i": np.arange(3)})
    assert np.array_equal(out["b"], np.full((3, 2), 2, np.float32))
    assert np.array_equal(out["j"], np.arange(3))


def test_outputs_are_not_views_of_inputs(model):
    """A kept state must not change when the caller reuses the request's arrays."""
    engine, ids = OnnxRuntimeEngine(model, threads=1), np.arange(3)
    out = engine.run({"a": np.ones((3, 2), np.float32), "i": ids})
    ids[:] = 7
    assert np.array_equal(out["j"], [0, 1, 2])


@pytest.mark.parametrize("content", [b"", b"\xffgarbage", None])
def test_what_cannot_be_loaded(tmp_path, content):
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    with one_line(BuildError, "m.onnx"):
        OnnxRuntimeEngine(tmp_path / "m.onnx")


def test_a_graph_cut_short(bundle_dir, tmp_path):
    data = (bundle_dir / "user_encoder.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[: len(data) // 2])
    with one_line(BuildError, "m.onnx"):
        OnnxRuntimeEngine(tmp_path / "m.onnx")


def test_weights_that_are_not_there(bundle_dir, tmp_path):
    (tmp_path / "m.onnx").write_bytes((bundle_dir / "user_encoder.onnx").read_bytes())
    with one_line(BuildError, "m.onnx"):
        OnnxRuntimeEngine(tmp_path / "m.onnx")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_not_there_is_no_silent_fallback(model):
    absent = next(
        p
        for p in ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NoSuchExecutionProvider")
        if p not in onnxruntime.get_available_providers()
    )
    with one_line(BuildError, absent):
        OnnxRuntimeEngine(model, providers=(absent, "CPUExecutionProvider"))


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"a": np.ones((3, 2), np.float32)},
        {"a": np.ones((3, 3), np.float32), "i": np.arange(3)},
        {"a": np.ones((3, 2)), "i": np.arange(3)},
        {"a": np.ones((3, 2), np.float32), "i": np.arange(3), "x": np.arange(3)},
    ],
    ids=["none", "missing", "shape", "dtype", "extra"],
)
def test_a_run_that_fails_says_on_what(model, inputs):
    with one_line(EngineError, *(f"{n} {list(x.shape)}" for n, x in inputs.items())):
        OnnxRuntimeEngine(model, threads=1).run(inputs)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_several_outputs_are_columns_of_one_score(rows):
    a, b = np.arange(rows, dtype=np.float32), np.ones((rows, 2), np.float32)
    assert np.shares_memory(scores_of([b]), b) == bool(rows)  # the only output is not copied
    assert np.array_equal(scores_of([a]), a[:, None])
    both = scores_of([a, b])
    assert both.shape == (rows, 3)
    assert np.array_equal(both[:, 0], a)
    assert np.array_equal(both[:, 1:], b)


def test_many_threads_at_once(model):
    engine, problems = OnnxRuntimeEngine(model, threads=1), []

    def work(seed):
        a = np.random.default_rng(seed).standard_normal((50, 2)).astype(np.float32)
        for _ in range(20):
            if not np.array_equal(engine.run({"a": a, "i": np.arange(50)})["b"], a + a):
                problems.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not problems


def test_an_onnx_runtime_that_can_end_the_process_is_refused(model, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")
    with one_line(BuildError, "1.31.1", "install onnxruntime 1.32"):
        OnnxRuntimeEngine(model)


def test_a_single_number_is_no_row_of_scores():
    with pytest.raises(EngineError, match="one number for all targets"):
        scores_of([np.ones((3, 1)), np.float32(1).reshape(())])
