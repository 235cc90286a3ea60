"""The reference model against its formulas, written a second time in numpy, one target at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from support import tiny

from stca import probe
from stca.export.analysis.cost import NominalSizes
from stca.export.reference.config import StcaConfig
from stca.export.reference.module import Stca, request_inputs, segment_of
from stca.export.to_onnx import RequestModel, to_request_graph
from stca.specs import TensorSpec

Array = NDArray[Any]
TIMES, FORMS = ("log", "delta"), ("projected", "absorbed")
# Lengths of history and number of targets, per request; nothing where a request can have nothing.
SIZES = ((5, 3), (0, 2), (1, 1), (7, 0), (0, 0), (12, 4))


def feeds_of(config: StcaConfig, sizes: Any = SIZES, seed: int = 0) -> dict[str, Array]:
    specs = request_inputs(config)
    rng = np.random.default_rng(seed)
    return probe.pack(specs, [probe.single(specs, n, m, rng) for n, m in sizes])


def run(model: Stca, feeds: Mapping[str, Array], call: str = "logits") -> Array:
    with torch.no_grad():
        out: Array = getattr(model, call)({n: torch.from_numpy(x) for n, x in feeds.items()}).numpy()
    return out


# --- segments ---------------------------------------------------------------------------------------------------------

LENGTHS = ([3, 4], [5], [0], [0, 0], [], [0, 0, 4, 0, 5, 0, 0], [1] * 9, [0, 7], [7, 0], [2, 0, 0, 0, 3, 1])


@given(st.lists(st.integers(0, 4), max_size=12))
def test_the_request_of_each_row(lengths):
    offsets = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    found = segment_of(int(offsets[-1]), offsets)
    assert found.dtype == torch.int64
    assert found.tolist() == np.repeat(np.arange(len(lengths)), lengths).tolist()


class OwnRequest(torch.nn.Module):
    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = segment_of(inputs["item"].shape[0], inputs["offsets"])
        return inputs["value"].index_select(0, own) + inputs["item"] * 0


@pytest.fixture(scope="module")
def own_request() -> onnx.ModelProto:
    return to_request_graph(
        RequestModel(
            OwnRequest(),
            (
                TensorSpec("item", "int64", ("N_h",), "user"),
                TensorSpec("offsets", "int32", ("B_plus_1",), "user"),
                TensorSpec("value", "int64", ("B",), "request"),
            ),
        )
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_request_of_each_row_in_onnx(own_request, lengths):
    """In the reference implementation and in ONNX Runtime, no row and no request included."""
    feeds = {
        "item": np.zeros(sum(lengths), np.int64),
        "offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "value": np.arange(len(lengths)) + 100,
    }
    expected = np.repeat(feeds["value"], lengths)
    session = onnxruntime.InferenceSession(own_request.SerializeToString(), providers=["CPUExecutionProvider"])
    for run in (session.run, ReferenceEvaluator(own_request).run):
        assert np.array_equal(run(None, feeds)[0], expected)


def test_segments_cost_as_many_operations_as_there_are_rows(own_request):
    """Not rows times requests: no value of the graph has more elements than rows and requests together, twice."""
    sizes = NominalSizes(own_request, {"N_h": 1000, "B": 200, "B_plus_1": 201})
    assert max(sizes.elements(name) for node in own_request.graph.node for name in node.output) <= 2 * 1200
    adding = [a for node in own_request.graph.node for a in node.attribute if a.name == "reduction" and a.s != b"none"]
    assert not adding, "TensorRT has no scatter that adds up"


# --- the formulas of arXiv 2511.06077 and 2507.15551, in numpy and integer arithmetic ---------------------------------


def hour_of(seconds: int) -> int:
    return (seconds // 3600) % 24


def duration_bucket(seconds: int) -> int:
    """0 below a second, k + 1 from 2^k seconds on, 24 from 2^23 on."""
    return min(max(seconds, 0).bit_length(), 24)


def layer_norm(x: Array, w: Mapping[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def swiglu(x: Array, w: Mapping[str, Array], name: str) -> Array:
    gate = x @ w[f"{name}.gate.weight"]
    return ((x @ w[f"{name}.up.weight"]) * (gate / (1 + np.exp(-gate)))) @ w[f"{name}.out.weight"]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def formula(config: StcaConfig, w: Mapping[str, Array], feeds: Mapping[str, Array]) -> Array:
    """Log-odds of one request, `[m, tasks]`; `feeds` without offsets."""
    d, h = config.width, config.heads
    d_h = d // h
    tokens, rows = len(feeds["history_item"]), []
    for l in range(tokens):
        parts = [w["item_table"][feeds["history_item"][l]]]
        parts += [w[f"field_tables.{f.name}"][feeds[f"history_{f.name}"][l]] for f in config.history_fields]
        time, gap = int(feeds["history_time"][l]), int(feeds["history_gap"][l])
        parts += [w["time_tables.hour"][hour_of(time)], w["time_tables.gap"][duration_bucket(gap)]]
        if config.time == "delta":
            parts.append(w["time_tables.delta"][duration_bucket(int(feeds["request_time"][0]) - time)])
        rows.append(np.concatenate(parts) @ w["history_in.weight"] + w["history_in.bias"])
    X = np.array(rows).reshape(tokens, d)

    scores = []
    for t in range(len(feeds["target_item"])):
        item = w["item_table"][feeds["target_item"][t]]
        fields = [w[f"field_tables.{f.name}"][feeds[f"target_{f.name}"][t]] for f in config.target_fields]
        x_t = np.concatenate([item, *fields]) @ w["target_in.weight"] + w["target_in.bias"]
        o: list[Array] = []
        for i in range(config.layers):
            seen = x_t if i == 0 else np.concatenate([*o, x_t]) @ w[f"query_in.{i - 1}.weight"]
            q = layer_norm(swiglu(seen, w, f"query_ffn.{i}"), w, f"query_norm.{i}")
            encoded = layer_norm(swiglu(X, w, f"layers.{i}.history_ffn"), w, f"layers.{i}.history_norm")
            heads = []
            for j in range(h):
                head = slice(j * d_h, (j + 1) * d_h)
                if tokens == 0:
                    heads.append(np.zeros(d_h))
                    continue
                keys = encoded @ w[f"layers.{i}.key.weight"][:, head]
                logits = (q @ w[f"layers.{i}.query.weight"][:, head]) @ keys.T / math.sqrt(d_h)
                alpha = np.exp(logits - logits.max())
                heads.append(alpha / alpha.sum() @ (encoded @ w[f"layers.{i}.value.weight"][:, head]))
            o.append(np.concatenate(heads) @ w[f"layers.{i}.out.weight"])
        z = swiglu(np.concatenate([*o, x_t]) @ w["summary_in.weight"], w, "summary_ffn")

        tokens_in = [z]
        tokens_in += [w[f"field_tables.{f.name}"][feeds[f"user_{f.name}"][0]] for f in config.user_fields]
        tokens_in += [w[f"field_tables.{f.name}"][feeds[f"request_{f.name}"][0]] for f in config.request_fields]
        tokens_in += [item, *fields]
        S = np.array([x @ w[f"token_in.{k}.weight"] + w[f"token_in.{k}.bias"] for k, x in enumerate(tokens_in)])
        T, D = S.shape
        for b in range(config.mixer_layers):
            mixed = np.array(
                [np.concatenate([S[j][i * D // T : (i + 1) * D // T] for j in range(T)]) for i in range(T)]
            )
            S = layer_norm(mixed + S, w, f"mixer.{b}.mix_norm")
            ffn = []
            for k in range(T):
                hidden = gelu(S[k] @ w[f"mixer.{b}.weight_in"][k] + w[f"mixer.{b}.bias_in"][k, 0])
                ffn.append(hidden @ w[f"mixer.{b}.weight_out"][k] + w[f"mixer.{b}.bias_out"][k, 0])
            S = layer_norm(np.array(ffn) + S, w, f"mixer.{b}.ffn_norm")
        scores.append(S.mean(0) @ w["task_out.weight"] + w["task_out.bias"])
    return np.array(scores).reshape(-1, len(config.tasks))


def formula_of_batch(model: Stca, feeds: Mapping[str, Array]) -> Array:
    weights = {n: p.detach().numpy().astype(np.float64) for n, p in model.state_dict().items()}
    requests = tiny.split_batch(request_inputs(model.config), feeds)
    return np.concatenate([formula(model.config, weights, r) for r in requests])


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("form", FORMS)
def test_is_the_formulas(time, form):
    model = tiny.module(tiny.config(time=time)).double()
    model.form = form
    feeds = feeds_of(model.config)
    expected = formula_of_batch(model, feeds)
    np.testing.assert_allclose(run(model, feeds), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(run(model, feeds, "forward"), 1 / (1 + np.exp(-expected)), rtol=1e-10)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1, "mixer_layers": 1, "heads": 1},
        {"layers": 4, "heads": 24, "ffn_expansion": 1},
        {"user_fields": (), "request_fields": (), "target_fields": (), "history_fields": (), "tasks": ("finish",)},
        {"user_fields": (("a", 2), ("b", 3)), "target_fields": (("category", 7), ("a", 2), ("c", 9))},
    ],
)
def test_is_the_formulas_at_other_sizes(changes):
    model = tiny.module(tiny.config(**changes)).double()
    feeds = feeds_of(model.config, ((4, 2), (0, 1), (3, 2)))
    np.testing.assert_allclose(run(model, feeds), formula_of_batch(model, feeds), rtol=1e-10, atol=1e-10)


POWERS = [2**k for k in range(25)] + [2**40]
GAPS = sorted({-5, -1, 0, *(p + s for p in POWERS for s in (-1, 0))})
HOURS = [3600 * k + s for k in (0, 1, 12, 23, 24, 25, 24 * 365) for s in (-1, 0, 1)] + [-3600, 1_700_000_000, 2**33]


@pytest.mark.parametrize("time", TIMES)
def test_time_buckets_at_their_boundaries(time):
    """One token per request, so that a token in the wrong bucket shows in its score."""
    model = tiny.module(tiny.config(time=time)).double()
    now = 1_700_000_000
    cases = [(t, 7, t + 100) for t in HOURS] + [(now, g, now + 5) for g in GAPS] + [(now - g, 3, now) for g in GAPS]
    specs = request_inputs(model.config)
    made = []
    for event, gap, asked in cases:
        one = probe.single(specs, 1, 1, np.random.default_rng(0))
        one |= {"history_time": np.array([event]), "history_gap": np.array([gap])}
        if time == "delta":
            one["request_time"] = np.array([asked])
        made.append(one)
    feeds = probe.pack(specs, made)
    expected = formula_of_batch(model, feeds)
    np.testing.assert_allclose(run(model, feeds), expected, rtol=1e-10, atol=1e-10)
    # The test can tell buckets apart: as many scores as there are different pairs or triples of buckets.
    triples = {(hour_of(t), duration_bucket(g), duration_bucket(a - t) if time == "delta" else 0) for t, g, a in cases}
    assert len(np.unique(expected[:, 0].round(9))) == len(triples)


def test_buckets_do_not_depend_on_the_float_precision():
    model = tiny.module(tiny.config(time="delta"))
    feeds = feeds_of(model.config)
    feeds["history_gap"][:] = 2**23 - 1  # rounds to 2^23 in half precision, and log2 of it to 23 in float32
    single, double = run(model, feeds), run(model.double(), feeds)
    np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("time", TIMES)
def test_both_attention_forms_are_the_same_function(time):
    model = tiny.module(tiny.config(time=time)).double()
    feeds = feeds_of(model.config)
    tensors = {n: torch.from_numpy(x) for n, x in feeds.items()}
    scores, gradients = [], []
    for form in FORMS:
        model.form = form
        model.zero_grad()
        out = model.logits(tensors)
        out.square().sum().backward()
        scores.append(out.detach().numpy())
        gradients.append({n: p.grad.numpy().copy() for n, p in model.named_parameters()})
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-11, atol=1e-11)
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, gradients[1][name], rtol=1e-8, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("time", TIMES)
def test_every_parameter_learns(time):
    model = tiny.module(tiny.config(time=time))
    feeds = feeds_of(model.config, ((40, 20), (0, 5), (30, 20)))
    model.logits({n: torch.from_numpy(x) for n, x in feeds.items()}).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_ragged_batch_is_its_requests_one_at_a_time(time, form):
    model = tiny.module(tiny.config(time=time)).double()
    model.form = form
    feeds = feeds_of(model.config)
    singles = [run(model, one) for one in tiny.split_batch(request_inputs(model.config), feeds)]
    np.testing.assert_allclose(run(model, feeds), np.concatenate(singles), rtol=1e-12, atol=1e-12)


def test_no_request_sees_another():
    """Change all of request 0; the scores of the others must not move by a bit."""
    model = tiny.module(tiny.config(time="delta"))
    a, b = feeds_of(model.config, seed=1), feeds_of(model.config, seed=1)
    specs = request_inputs(model.config)
    for spec in specs:
        if spec.shape != ("B_plus_1",):
            rows = {"N_h": SIZES[0][0], "N_t": SIZES[0][1], "B": 1}[str(spec.shape[0])]
            b[spec.name][:rows] = (b[spec.name][:rows] + 1) % (spec.limit or 2**40)
    x, y = run(model, a), run(model, b)
    assert not np.array_equal(x[: SIZES[0][1]], y[: SIZES[0][1]])
    assert np.array_equal(x[SIZES[0][1] :], y[SIZES[0][1] :])


def test_history_is_a_set_and_targets_do_not_see_each_other(rng):
    """Tokens carry their own times, so their order in the array says nothing."""
    model = tiny.module(tiny.config()).double()
    feeds = feeds_of(model.config, ((9, 6),))
    history, targets = rng.permutation(9), rng.permutation(6)
    # Offsets and what there is once per request have neither 9 rows nor 6.
    moved = {n: x[history] if len(x) == 9 else x[targets] if len(x) == 6 else x for n, x in feeds.items()}
    np.testing.assert_allclose(run(model, moved), run(model, feeds)[targets], rtol=1e-12, atol=1e-12)
    alone = {n: x[:1] if len(x) == 6 else x for n, x in feeds.items()} | {"target_offsets": np.array([0, 1], np.int32)}
    np.testing.assert_allclose(run(model, alone), run(model, feeds)[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [((0, 0),), ((0, 5),), ((5, 0),), (), ((0, 0), (0, 0))])
def test_sizes_of_zero(sizes):
    model = tiny.module(tiny.config(time="delta"))
    feeds = feeds_of(model.config, sizes or ((0, 0),))
    if not sizes:
        feeds = {n: x[:1] if n.endswith("offsets") else x[:0] for n, x in feeds.items()}
    scores = run(model, feeds, "forward")
    assert scores.shape == (sum(m for _, m in sizes), 2)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("key_heads", [1, 2])
def test_gradient_of_the_operator(key_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, h, w, dtype=torch.float64, generator=generator, requires_grad=True)
        for n, h, w in ((5, 2, 3), (6, key_heads, 3), (6, key_heads, 2))
    )
    # The third request has no history, the second no targets.
    targets, history = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 4, 6, 6], dtype=torch.int32)
    lengths = torch.tensor([3, 2, 0], dtype=torch.int32)  # one token of the first segment is padding
    op = torch.ops.stca.target_history_attention
    assert torch.autograd.gradcheck(lambda *x: op(*x, targets, history, lengths, 0.7), (q, k, v))
    op(q, k, v, targets, history, lengths, 0.7).sum().backward()
    assert k.grad is not None
    assert not k.grad[3].any()


@pytest.mark.parametrize("time", TIMES)
def test_torch_export_keeps_one_node_per_attention_and_every_size_free(time):
    model = tiny.module(tiny.config(time=time))
    feeds = feeds_of(model.config, ((4, 3), (3, 2)))
    tensors = {n: torch.from_numpy(x) for n, x in feeds.items()}
    dynamic = {n: {0: torch.export.Dim.DYNAMIC} for n in tensors}
    program = torch.export.export(model, (tensors,), dynamic_shapes=(dynamic,), strict=False)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.stca.target_history_attention.default]
    assert len(nodes) == model.config.layers
    exported = program.module()
    # torch takes a symbolic size to be 2 or more and guards for it; the ONNX graphs are tested at 0 and 1.
    for sizes in (((9, 1), (3, 2), (2, 2)), SIZES):
        other = feeds_of(model.config, sizes, seed=2)
        with torch.no_grad():
            got = exported({n: torch.from_numpy(x) for n, x in other.items()}).numpy()
        np.testing.assert_allclose(got, run(model, other, "forward"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("time", TIMES)
def test_inputs_are_the_documented_ones(time):
    inputs = {s.name: (s.dtype, s.shape, s.scope, s.limit) for s in request_inputs(tiny.config(time=time))}
    expected = {
        "history_item": ("int64", ("N_h",), "user", 97),
        "history_action": ("int64", ("N_h",), "user", 4),
        "history_category": ("int64", ("N_h",), "user", 7),
        "history_time": ("int64", ("N_h",), "user", None),
        "history_gap": ("int64", ("N_h",), "user", None),
        "history_offsets": ("int32", ("B_plus_1",), "user", None),
        "user_segment": ("int64", ("B",), "user", 5),
        "request_device": ("int64", ("B",), "request", 3),
        "request_time": ("int64", ("B",), "request", None),
        "target_item": ("int64", ("N_t",), "target", 97),
        "target_category": ("int64", ("N_t",), "target", 7),
        "target_offsets": ("int32", ("B_plus_1",), "target", None),
    }
    if time == "log":
        del expected["request_time"]
    assert inputs == expected
    assert list(inputs) == list(expected)


def test_a_shared_field_has_one_table():
    model = tiny.module(tiny.config())
    assert sorted(n for n, _ in model.named_parameters() if n.startswith("field_tables")) == [
        f"field_tables.{n}" for n in ("action", "category", "device", "segment")
    ]
