"""Exported graphs: valid ONNX, every size free, the checkpoint's own weights, and the same numbers in every runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from support.errors import one_line
from torch import nn

from stca import probe
from stca.bundle import Bundle
from stca.errors import ExportError, UsageError
from stca.export.analysis.onnx_reference import reference_of
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.to_onnx import RequestModel, to_request_graph
from stca.export.weights import offsets
from stca.plugins import onnx_function
from stca.runtime import OnnxRuntimeEngine
from stca.specs import TensorSpec

# The fourth, delta and absorbed, shares every line of code with one of these.
EXPORTS = (("log", "projected"), ("log", "absorbed"), ("delta", "projected"))
GRAPHS = ("request", "user_encoder", "target_scorer")


@pytest.fixture(scope="module", params=EXPORTS, ids="-".join)
def export(request, exported, checkpoint_file):
    """A bundle, the module it was made from, and its three graphs in ONNX Runtime."""
    time, form = request.param
    bundle = Bundle.load(exported(time, form))
    module = load_checkpoint(checkpoint_file(time)).build(form)
    return bundle, module, {g: OnnxRuntimeEngine(bundle.file(g), threads=1) for g in GRAPHS}


def feeds_for(bundle, *sizes, seed=0):
    specs = bundle.manifest.graphs["request"].inputs
    rng = np.random.default_rng(seed)
    if sizes:
        return probe.pack(specs, [probe.single(specs, n, m, rng) for n, m in sizes])
    one = probe.pack(specs, [probe.single(specs, 0, 0, rng)])
    return {n: x[:1] if n.endswith("offsets") else x[:0] for n, x in one.items()}


def run_graph(engines, bundle, graph, values):
    return engines[graph].run({s.name: values[s.name] for s in bundle.manifest.graphs[graph].inputs})


def run_whole(engines, bundle, feeds):
    return run_graph(engines, bundle, "request", feeds)["scores"]


def run_halves(engines, bundle, feeds):
    state = run_graph(engines, bundle, "user_encoder", feeds)
    return run_graph(engines, bundle, "target_scorer", {**feeds, **state})["scores"]


def run_module(module, feeds):
    with torch.no_grad():
        return module({n: torch.from_numpy(x) for n, x in feeds.items()}).numpy()


@pytest.mark.parametrize("graph", GRAPHS)
def test_passes_onnx_full_checker_and_strict_shape_inference(export, graph):
    bundle, *_ = export
    onnx_function.register_schema()
    file = bundle.file(graph)
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {o.domain for o in model.opset_import} <= {"", "stca"}
    assert {n.domain for n in model.graph.node} <= {"", "stca"}


def test_attention_is_one_node_per_layer_with_its_body_in_the_file(export):
    bundle, module, _ = export
    whole, scorer = (onnx.load(bundle.file(g), load_external_data=False) for g in ("request", "target_scorer"))
    for model in (whole, scorer):
        nodes = [n for n in model.graph.node if n.op_type == "TargetHistoryAttention"]
        assert len(nodes) == module.config.layers
        assert ("stca", "TargetHistoryAttention") in {(f.domain, f.name) for f in model.functions}


def test_inputs_and_outputs_are_as_the_manifest_says(export):
    bundle, module, _ = export
    for graph, spec in bundle.manifest.graphs.items():
        model = onnx.load(bundle.file(graph), load_external_data=False)
        for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            found = []
            for v in values:
                kind = v.type.tensor_type
                shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
                found.append((v.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape))
            assert found == [(s.name, s.dtype, s.shape) for s in specs], graph
    (scores,) = bundle.manifest.graphs["request"].outputs
    assert (scores.name, scores.dtype, scores.shape) == ("scores", "float32", ("N_t", len(module.config.tasks)))


def test_every_floating_initializer_is_a_checkpoint_tensor_by_name_and_bytes(export):
    bundle, module, _ = export
    checkpoint = {n: t.numpy().tobytes() for n, t in module.state_dict().items()}
    weights = (bundle.path / "weights.safetensors").read_bytes()
    places = {name: (begin, end - begin) for name, (begin, end) in offsets(bundle.path / "weights.safetensors").items()}
    used: dict[str, set[str]] = {}
    for graph in GRAPHS:
        model = onnx.load(bundle.file(graph), load_external_data=False)
        floating = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        used[graph] = {t.name for t in floating}
        for tensor in floating:
            where = {e.key: e.value for e in tensor.external_data}
            assert where["location"] == "weights.safetensors"
            begin, length = int(where["offset"]), int(where["length"])
            assert (begin, length) == places[tensor.name]
            assert weights[begin : begin + length] == checkpoint[tensor.name], tensor.name
            assert list(tensor.dims) == list(module.state_dict()[tensor.name].shape)
        # Nor were weights folded into constants: those are numbers of the formulas, such as 0.5.
        for node in model.graph.node:
            for a in node.attribute:
                if node.op_type == "Constant" and a.name == "value" and a.t.data_type == onnx.TensorProto.FLOAT:
                    assert numpy_helper.to_array(a.t).size == 1
    assert used["request"] == checkpoint.keys()
    assert used["user_encoder"] | used["target_scorer"] == checkpoint.keys()


@pytest.mark.parametrize("sizes", [((5, 3), (0, 2), (7, 4), (3, 0)), ((6, 5),), ((0, 1),)], ids=str)
def test_onnx_reference_and_onnx_runtime_and_torch_agree(export, sizes):
    bundle, module, engines = export
    feeds = feeds_for(bundle, *sizes)
    expected = run_module(module.double(), feeds)
    module.float()
    models = {g: ReferenceEvaluator(str(bundle.file(g))) for g in GRAPHS}
    reference = models["request"].run(None, feeds)[0]
    inputs = {s.name: feeds[s.name] for s in bundle.manifest.graphs["user_encoder"].inputs}
    names = [s.name for s in bundle.manifest.graphs["user_encoder"].outputs]
    values = {**feeds, **dict(zip(names, models["user_encoder"].run(None, inputs), strict=True))}
    scorer_inputs = {s.name: values[s.name] for s in bundle.manifest.graphs["target_scorer"].inputs}
    joined = models["target_scorer"].run(None, scorer_inputs)[0]
    assert np.array_equal(reference, joined), "the same operations in the same order"
    for got in (reference, run_whole(engines, bundle, feeds), run_halves(engines, bundle, feeds)):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("tokens", [0, 1, 10_240])
@pytest.mark.parametrize("targets", [0, 1, 300])
def test_history_and_targets_of_any_size(export, tokens, targets):
    bundle, module, engines = export
    feeds = feeds_for(bundle, (tokens, targets))
    expected = run_module(module, feeds)
    for run in (run_whole, run_halves):
        got = run(engines, bundle, feeds)
        assert got.shape == (targets, 2)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [0, 1, 33])
def test_batches_of_any_size(export, batch):
    bundle, module, engines = export
    feeds = feeds_for(bundle, *(((i * 5) % 7, (i * 3) % 4) for i in range(batch)), seed=batch)
    expected = run_module(module, feeds)
    for run in (run_whole, run_halves):
        got = run(engines, bundle, feeds)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_both_forms_are_one_function(exported):
    bundles = [Bundle.load(exported("log", form)) for form in ("projected", "absorbed")]
    feeds = feeds_for(bundles[0], (9, 4), (0, 1), (2, 2))
    scores = [run_whole({"request": OnnxRuntimeEngine(b.file("request"), threads=1)}, b, feeds) for b in bundles]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
    states = [{s.name for s in b.manifest.state} for b in bundles]
    assert {"attention_0_key", "attention_0_value", "attention_1_key", "attention_1_value"} <= states[0]
    assert {"attention_0_history", "attention_1_history"} <= states[1]
    per_token = [sum(s.bytes_per_token for s in b.manifest.state) for b in bundles]
    assert per_token == [2 * 2 * 24 * 4, 2 * 24 * 4], "2·d values per layer projected, d absorbed (model.md)"


# --- what cannot be exported ------------------------------------------------------------------------------------------

ROWS = TensorSpec("x", "float32", ("N_t", 4), "target")


class Fixed(nn.Module):
    def forward(self, inputs):
        return inputs["x"].reshape(5, 4) * 2


class Branch(nn.Module):
    def forward(self, inputs):
        return inputs["x"] if inputs["x"].sum() > 0 else -inputs["x"]


class Broken(nn.Module):
    def forward(self, inputs):
        return inputs["y"]


class Unconvertible(nn.Module):
    def forward(self, inputs):
        return torch.linalg.eigvals(inputs["x"].T @ inputs["x"]).real


@pytest.mark.parametrize(
    ("module", "words"), [(Fixed(), ()), (Branch(), ()), (Broken(), ("y",)), (Unconvertible(), ())], ids=repr
)
def test_a_module_that_cannot_be_exported(module, words, capfd):
    with one_line(ExportError, *words):
        to_request_graph(RequestModel(module, (ROWS,)))
    assert not capfd.readouterr().out


class Encoder(nn.Module):
    """With a mask, of which a layer of torch's asks whether it is causal: the newer exporter stops there."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.register_buffer("mask", torch.triu(torch.ones(3, 3, dtype=torch.bool), 1))

    def forward(self, inputs):
        return self.layers(inputs["x"], mask=self.mask)[:, -1]


def test_what_the_newer_exporter_cannot_trace_the_older_one_may():
    said = []
    module = Encoder().eval()
    graph = to_request_graph(RequestModel(module, (TensorSpec("x", "float32", ("N_t", 3, 4), "target"),)), said.append)
    assert any("taking the older one" in s for s in said)
    x = np.random.default_rng(0).standard_normal((6, 3, 4)).astype(np.float32)
    (found,) = ReferenceEvaluator(graph).run(None, {"x": x})
    with torch.no_grad():
        wanted = module({"x": torch.from_numpy(x)}).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


class Plain(nn.Module):
    def forward(self, inputs):
        return inputs["x"] * 2


class Sum(nn.Module):
    def forward(self, inputs):
        return sum(inputs.values())


class Scaled(nn.Module):
    """Attention over three axes, which torch's exporter takes over four alone, with a scale made of constants."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, inputs):
        history, target = inputs["history"] @ self.weight, inputs["target"]
        scale = torch.rsqrt(torch.zeros(1) + 16.0) * 2
        queries = (target * scale)[:, None]
        attended = nn.functional.scaled_dot_product_attention(queries, history, history, scale=1.0)
        return attended[:, 0] @ self.weight.T


def test_what_is_computed_of_constants_is_folded_and_no_weight():
    torch.manual_seed(0)
    module = Scaled()
    inputs = (
        TensorSpec("history", "float32", ("B", "L", 16), "user"),
        TensorSpec("target", "float32", ("B", 16), "target"),
    )
    graph = to_request_graph(RequestModel(module, inputs))
    assert [tuple(t.dims) for t in graph.graph.initializer] == [(16, 16)], "a folded constant is no weight"
    assert np.array_equal(numpy_helper.to_array(graph.graph.initializer[0]), module.weight.detach().numpy())
    assert not {n.op_type for n in graph.graph.node} & {"Sqrt", "Reciprocal", "Expand", "Add"}, "left to be computed"
    feeds = {"history": torch.randn(3, 5, 16), "target": torch.randn(3, 16)}
    (scores,) = ReferenceEvaluator(graph).run(None, {n: x.numpy() for n, x in feeds.items()})
    torch.testing.assert_close(torch.from_numpy(scores), module(feeds))


def test_training_mode_is_told_where_it_matters():
    inputs = (
        TensorSpec("history", "float32", ("B", 4), "user"),
        TensorSpec("target", "float32", ("B", 4), "target"),
    )

    class Joined(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, inputs):
            return self.part(inputs["history"] + inputs["target"])

    told = []
    for part in (nn.Dropout(), nn.LayerNorm(4), nn.Dropout().eval(), nn.RReLU()):
        to_request_graph(RequestModel(Joined(part), inputs), told.append)
    training = [line for line in told if "training mode" in line]
    assert training == ["the module is in training mode: exporting it as after eval()"] * 2


def test_an_unused_input_stays_an_input():
    unused = TensorSpec("unused", "int64", ("N_t",), "target")
    graph = to_request_graph(RequestModel(Plain(), (ROWS, unused))).graph
    assert [(i.name, i.type.tensor_type.shape.dim[0].dim_param) for i in graph.input] == [
        ("x", "N_t"),
        ("unused", "N_t"),
    ]


def test_an_input_is_offsets_by_its_shape_and_not_by_its_name():
    price = TensorSpec("price_offsets", "float32", ("N_t", 4), "target")
    graph = to_request_graph(RequestModel(Sum(), (ROWS, price))).graph
    assert [i.name for i in graph.input] == ["x", "price_offsets"]


def test_two_sizes_that_the_code_makes_one():
    other = TensorSpec("y", "float32", ("N_h", 4), "user")
    with one_line(ExportError, "size"):
        to_request_graph(RequestModel(Sum(), (ROWS, other)))


def test_the_operator_needs_its_lengths_to_be_exported():
    class WithoutLengths(nn.Module):
        def forward(self, inputs):
            x, o = inputs["x"].unsqueeze(1), inputs["target_offsets"]
            return torch.ops.stca.target_history_attention(x, x, x, o, o, None, 1.0)

    offsets_spec = TensorSpec("target_offsets", "int32", ("B_plus_1",), "target")
    with one_line(ExportError, "history_lengths"):
        to_request_graph(RequestModel(WithoutLengths(), (ROWS, offsets_spec)))


def test_a_limit_is_of_ids():
    with one_line(UsageError, "'mask' is float32", "leave the limit out"):
        TensorSpec("mask", "float32", ("N_h",), "user", limit=2)


class Joined(nn.Module):
    """A user's own history, then that and other users' in one softmax."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.biased = biased

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        op, ends = torch.ops.stca.target_history_attention, (x["target_offsets"], x["history_offsets"])
        query, key = (torch.tanh(x[name])[:, None] for name in ("target", "history"))
        own = op(query, key, key, *ends, x["history_offsets"].diff(), 0.5)
        bias = [x["similarity"] * 2] if self.biased else []
        starts = torch.cat([x["segment_starts"], x["history_offsets"][-1:]])
        lists = (starts, x["segment_lengths"], 0.5, x["segment_offsets"], *bias)
        return (own + op(query, key, key, x["target_offsets"], *lists)).flatten(1)


@pytest.mark.parametrize("biased", [True, False])
def test_one_file_holds_attention_over_one_segment_and_over_lists(biased):
    inputs = (
        TensorSpec("target", "float32", ("N_t", 8), "target"),
        TensorSpec("history", "float32", ("N_h", 8), "user"),
        TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
        TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
        TensorSpec("segment_starts", "int32", ("N_s",), "request"),
        TensorSpec("segment_lengths", "int32", ("N_s",), "request"),
        TensorSpec("segment_offsets", "int32", ("B_plus_1",), "request"),
        TensorSpec("similarity", "float32", ("N_s",), "request"),
    )
    model = to_request_graph(RequestModel(Joined(biased), inputs))
    assert [n.overload for n in model.graph.node if n.op_type == "TargetHistoryAttention"] == ["", "segments"]
    onnx_function.register_schema()
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in (("target", (5, 8)), ("history", (9, 8)))}
    lists = {"target_offsets": [0, 2, 5], "history_offsets": [0, 4, 9], "segment_starts": [4, 0, 0]}
    lists |= {"segment_lengths": [5, 4, 3], "segment_offsets": [0, 2, 3]}
    feeds |= {n: np.array(x, dtype=np.int32) for n, x in lists.items()} | {
        "similarity": np.array([1, -1, 2], dtype=np.float32)
    }
    expected = run_module(Joined(biased), feeds)
    read = {i.name for i in model.graph.input}
    for run in (onnxruntime.InferenceSession(model.SerializeToString()), reference_of(model)):
        (scores,) = run.run(None, {n: x for n, x in feeds.items() if n in read})
        np.testing.assert_allclose(scores, expected, atol=1e-6)
