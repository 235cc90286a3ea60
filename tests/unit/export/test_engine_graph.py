"""What an engine's parser is given: weights by name from one plain file, and no path it could follow."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from support.errors import one_line

from stca.bundle import Bundle
from stca.errors import BuildError, ExportError
from stca.export.engine_graph import engine_graph, estimate_memory, read_graph
from stca.export.weights import externalize
from stca.manifest import WEIGHTS


@pytest.fixture
def bundle(bundle_dir, tmp_path):
    return Bundle.load(shutil.copytree(bundle_dir, tmp_path / "B"))


def test_weights_are_read_and_no_path_is_left(bundle):
    file = bundle.file("target_scorer")
    model, weights = read_graph(file)
    true = {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    assert weights
    assert all(np.array_equal(true[name], values) for name, values in weights.items())
    assert not [t.name for t in model.graph.initializer if t.external_data or t.HasField("data_location")]


def relocated(bundle, **changes):
    """The scorer's file, with the place of its first external weight changed."""
    file = bundle.file("target_scorer")
    model = onnx.load(file, load_external_data=False)
    weight = next(t for t in model.graph.initializer if t.external_data)
    for entry in weight.external_data:
        entry.value = str(changes.get(entry.key, entry.value))
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("location", ["../outside", "/etc/passwd", "other.bin", f"./{WEIGHTS}"])
def test_a_weight_elsewhere_is_refused(bundle, location):
    with one_line(BuildError, "target_scorer.onnx", repr(location), WEIGHTS):
        read_graph(relocated(bundle, location=location))


@pytest.mark.parametrize("changes", [{"offset": 10**12}, {"offset": -4}, {"length": 4}])
def test_a_weight_beyond_its_file_is_refused(bundle, changes):
    with one_line(BuildError, "does not fit"):
        read_graph(relocated(bundle, **changes))


@pytest.mark.parametrize(
    "make",
    [os.symlink, lambda _, at: at.mkdir(), lambda _, at: at.touch(), lambda _, at: os.mkfifo(at), lambda *_: None],
)
def test_a_weights_file_that_is_no_plain_file_is_refused(bundle, tmp_path, make):
    weights = bundle.path / WEIGHTS
    shutil.move(weights, tmp_path / "moved")
    make(tmp_path / "moved", weights)
    with one_line(BuildError, WEIGHTS):
        read_graph(bundle.file("target_scorer"))


def test_not_a_model(bundle):
    bundle.file("request").write_bytes(b"no protobuf")
    with one_line(BuildError, "request.onnx", "not an ONNX model"):
        read_graph(bundle.file("request"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_saved_graph_is_the_graph(bundle, tmp_path, precision):
    state = [s.name for s in bundle.manifest.state]
    graph = engine_graph(bundle.file("target_scorer"), state=state, precision=precision, lowering="decomposed")
    saved = onnx.load(graph.save(tmp_path / "x.onnx"))
    true = {t.name: numpy_helper.to_array(t).tobytes() for t in graph.complete().graph.initializer}
    assert {t.name: numpy_helper.to_array(t).tobytes() for t in saved.graph.initializer} == true
    assert (tmp_path / "x.weights").stat().st_size > 1000


def test_scalars_among_the_weights(tmp_path):
    """A bundle keeps every float among its weights: scalars get the same care there as inside a graph."""

    def graph(value, body="k = Neg (x) s = Add (k, c) y = Exp (s)"):
        head = '<ir_version: 10, opset_import: ["" : 18]> g (float[n] x) => (float[n] y)'
        model = parser.parse_model(f"{head} <float c = {{{value}}}> {{ {body} }}")
        externalize([model], tmp_path)
        onnx.save(model, tmp_path / "x.onnx")
        return engine_graph(tmp_path / "x.onnx", state=(), precision="fp16")

    (c,) = graph(-1e9).complete().graph.initializer
    assert numpy_helper.to_array(c) == -65504
    for value in (1e-8, 86400):
        with one_line(ExportError, "'c'", "bf16"):
            graph(value).complete()
        (c,) = graph(value, "p = Mul (x, x) s = Add (p, c) y = Log (s)").complete().graph.initializer
        assert numpy_helper.to_array(c) == np.float32(value)
        with one_line(ExportError, "'c'", "bf16"):  # read in both types: the graph would cast it
            graph(
                value,
                "p = Mul (x, x) s = Add (p, c) t = Log (s) k = Neg (x) d = Add (k, c) s2 = Add (t, d) y = Abs (s2)",
            )


def test_memory_grows_with_sizes_and_halves_with_precision(bundle):
    state = [s.name for s in bundle.manifest.state]
    wide, low = (engine_graph(bundle.file("target_scorer"), state=state, precision=p) for p in ("fp32", "bf16"))
    few, many = ({"N_h": n, "N_t": 10, "B": 1, "B_plus_1": 2} for n in (100, 1000))
    at = [estimate_memory(g, s) for g, s in ((wide, few), (wide, many), (low, many))]
    assert (
        at[0]["weights"]
        == at[1]["weights"]
        == sum(t.nbytes for t in map(numpy_helper.to_array, wide.complete().graph.initializer))
    )
    assert at[2]["weights"] < 0.6 * at[1]["weights"]
    tokens = sum(s.bytes_per_token for s in bundle.manifest.state)
    assert at[1]["inputs_and_outputs"] - at[0]["inputs_and_outputs"] == 900 * tokens
    assert 0 < at[2]["activations"] < at[1]["activations"]
