"""One weights file for several graphs: equal weights, equal bytes; and every graph reads its own tensors from it."""

from __future__ import annotations

import hashlib
import random

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import safetensors.torch
from onnx import TensorProto, helper, numpy_helper
from support.errors import one_line

from stca.errors import ExportError
from stca.export.weights import externalize, offsets
from stca.manifest import WEIGHTS


def graph(**weights):
    """A model that returns the sum of each of its weights."""
    tensors = [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"{t.name}_out", t.data_type, list(t.dims)) for t in tensors]
    body = helper.make_graph(nodes, "g", [], outputs, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


RNG = np.random.default_rng(0)
WEIGHTS_OF_ALL_KINDS = {
    "single": RNG.standard_normal((3, 5)).astype(np.float32),
    "double": RNG.standard_normal((2, 2)),
    "half": RNG.standard_normal(7).astype(np.float16),
    "brain": RNG.standard_normal((3, 1)).astype(ml_dtypes.bfloat16),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 4), np.float32),
    "signed_zero": np.array([-0.0, 0.0], np.float32),
    "ids": np.arange(6),
    "small_ids": np.arange(4, dtype=np.int32),
}


def test_the_graphs_read_back_what_they_had(tmp_path):
    models = [graph(**WEIGHTS_OF_ALL_KINDS), graph(single=WEIGHTS_OF_ALL_KINDS["single"])]
    externalize(models, tmp_path)
    for i, model in enumerate(models):
        onnx.save(model, tmp_path / f"{i}.onnx")
        loaded = onnx.load(tmp_path / f"{i}.onnx")
        for tensor in loaded.graph.initializer:
            expected = np.asarray(WEIGHTS_OF_ALL_KINDS[tensor.name])
            got = numpy_helper.to_array(tensor)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert got.tobytes() == expected.tobytes()
    session = onnxruntime.InferenceSession(tmp_path / "0.onnx", providers=["CPUExecutionProvider"])
    names = [n for n in WEIGHTS_OF_ALL_KINDS if n != "brain"]  # which numpy cannot take from ONNX Runtime
    for name, got in zip(names, session.run([f"{n}_out" for n in names], {}), strict=True):
        assert got.tobytes() == np.asarray(WEIGHTS_OF_ALL_KINDS[name]).tobytes(), name


def test_only_floating_point_moves_and_the_graphs_hold_no_copy(tmp_path):
    big = RNG.standard_normal((64, 64)).astype(np.float32)
    model = graph(big=big, ids=np.arange(6))
    externalize([model], tmp_path)
    assert big.tobytes()[:64] not in model.SerializeToString()
    assert {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL} == {"big"}
    assert set(safetensors.numpy.load_file(tmp_path / WEIGHTS)) == {"big"}


@pytest.mark.parametrize("field", ["raw_data", "float_data"])
def test_both_ways_of_holding_values(tmp_path, field):
    values = RNG.standard_normal(4).astype(np.float32)
    model = graph(w=values)
    if field == "float_data":
        model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, [4], values))
    externalize([model], tmp_path)
    assert safetensors.numpy.load_file(tmp_path / WEIGHTS)["w"].tobytes() == values.tobytes()


def test_the_file_depends_on_the_weights_alone(tmp_path):
    """Not on the order of initializers, of graphs, or on how often a weight occurs."""
    names = list(WEIGHTS_OF_ALL_KINDS)
    digests = set()
    for seed in range(4):
        random.Random(seed).shuffle(names)
        shuffled = {n: WEIGHTS_OF_ALL_KINDS[n] for n in names}
        models = [graph(**shuffled), graph(**dict(list(shuffled.items())[:4])), graph(ids2=np.arange(seed + 1))]
        random.Random(seed).shuffle(models)
        directory = tmp_path / str(seed)
        directory.mkdir()
        externalize(models, directory)
        digests.add(hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    "other",
    [np.ones(3, np.float32), np.zeros(4, np.float32), np.zeros((1, 3), np.float32), np.zeros(3), -np.zeros(3, "f")],
    ids=["values", "size", "shape", "dtype", "sign of zero"],
)
def test_one_name_is_one_tensor(tmp_path, other):
    with one_line(ExportError, "'w'", "differs between graphs"):
        externalize([graph(w=np.zeros(3, np.float32)), graph(w=other)], tmp_path)


def test_nan_equals_itself_as_bytes(tmp_path):
    """A weight that is not finite is another check's business; it does not differ between graphs."""
    nan = np.array([np.nan, 1], np.float32)
    externalize([graph(w=nan), graph(w=nan)], tmp_path)
    assert safetensors.numpy.load_file(tmp_path / WEIGHTS)["w"].tobytes() == nan.tobytes()


def test_offsets_are_those_of_the_format(tmp_path):
    file = tmp_path / "w.safetensors"
    tensors = {n: np.asarray(w) for n, w in WEIGHTS_OF_ALL_KINDS.items() if n not in ("brain", "scalar")}
    safetensors.numpy.save_file(tensors, file, {"some": "metadata"})
    data = file.read_bytes()
    places = offsets(file)
    assert places.keys() == tensors.keys()
    for name, (begin, end) in places.items():
        assert data[begin:end] == tensors[name].tobytes()


def test_a_graph_without_weights(tmp_path):
    externalize([graph(ids=np.arange(3))], tmp_path)
    assert safetensors.numpy.load_file(tmp_path / WEIGHTS) == {}


def test_a_name_that_safetensors_keeps_for_itself(tmp_path):
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "__metadata__")
    graph = helper.make_graph([], "g", [], [], [weight])
    with one_line(ExportError, "'__metadata__'", "another"):
        externalize([helper.make_model(graph)], tmp_path)
