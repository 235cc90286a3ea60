"""Neighbours' states are read where they lie: the scores of one history, and nothing that copies a key or a value."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support import tiny

from stca import probe
from stca.bundle import seal
from stca.calibration.quantized_bundle import write_quantized
from stca.calibration.quantized_state import StateFormat
from stca.checks.bench import bench
from stca.checks.verify import prove
from stca.errors import ParityError
from stca.export.analysis.scope import walk
from stca.export.pipeline import CutOptions, export_checkpoint, export_module
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.to_onnx import RequestModel
from stca.pieces import PIECES, piece_of, pieces_of
from stca.runtime import Request, Session
from stca.runtime.deadline import NEVER
from stca.specs import OFFSETS, TARGETS, TOKENS, TensorSpec

NEIGHBOURS = 8
# Operators that copy; Reshape, Squeeze and Unsqueeze give another shape to the same memory.
MOVES = frozenset(("Cast", "Concat", "Expand", "Gather", "Identity", "Slice", "Split", "Tile", "Transpose"))
ROUNDING = {"rtol": 0, "atol": 2e-6}
HISTORY = [
    TensorSpec("events", "int64", (TOKENS,), "user", 50),
    TensorSpec("history_offsets", "int32", (OFFSETS,), "user"),
]
TARGET = [
    TensorSpec("items", "int64", (TARGETS,), "target", 50),
    TensorSpec("target_offsets", "int32", (OFFSETS,), "target"),
]


@pytest.fixture(scope="module", params=["projected", "absorbed"])
def bundle(request, tmp_path_factory, checkpoint_file):
    checkpoint, out = load_checkpoint(checkpoint_file("log")), tmp_path_factory.mktemp("pieces") / "bundle"
    cut = CutOptions(pieces=NEIGHBOURS + 1)
    return export_checkpoint(checkpoint, out, prove=tiny.no_proof, form=request.param, cut=cut)


@pytest.fixture
def session(bundle):
    return Session.load(bundle.path, threads=1)


def cut(session, *tokens):
    """A request for a history, and the same as one of a user with its first piece and neighbours with the others."""
    specs = session.manifest.graphs["request"].inputs
    whole = probe.single(specs, sum(tokens), 4, np.random.default_rng(0))
    events = [s.name for s in specs if s.scope == "user" and s.shape[:1] == (TOKENS,)]
    user = {s.name: whole[s.name] for s in specs if s.scope == "user" and s.name in whole}
    ends = np.cumsum([0, *tokens])
    pieces = [{n: x[a:b] if n in events else x for n, x in user.items()} for a, b in itertools.pairwise(ends)]
    near = [Request(one, f"n{i}", 1) for i, one in enumerate(pieces[1:])]
    return Request(whole), Request({**whole, **pieces[0]}, "ann", 1, near)


@pytest.mark.parametrize(
    "tokens",
    [(5,), (5, 3), (5, 0, 3), (0, 4), (0, 0), (1,) * 9, (0, 0, 7, 0, 0, 0, 0, 2, 0)],
    ids=lambda t: ",".join(map(str, t)),
)
def test_pieces_are_one_history(session, tokens):
    whole, apart = cut(session, *tokens)
    for _ in ("missed", "kept"):
        found = session.answer(apart)
        np.testing.assert_allclose(found.scores, session.score(whole), **ROUNDING)
        assert found.copied == 0


def test_more_pieces_than_the_graph_takes_are_joined(session):
    whole, apart = cut(session, *(1,) * 10)
    found = session.answer(apart)
    np.testing.assert_allclose(found.scores, session.score(whole), **ROUNDING)
    assert found.copied > 0


def test_a_neighbour_who_is_left_out(session):
    whole, apart = cut(session, 5, 3)
    gone = Request({}, "gone", 1)
    asked = dataclasses.replace(apart, neighbours=[gone, *apart.neighbours, gone], leave_out=True)
    found = session.answer(asked)
    np.testing.assert_allclose(found.scores, session.score(whole), **ROUNDING)
    assert (found.neighbours, found.copied) == ((("left_out", "miss", "left_out"),), 0)


def executed(model, folder):
    """A graph as ONNX Runtime executes it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "executed.onnx")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "executed.onnx", load_external_data=False).graph


def readers(graph, names):
    return {n.op_type for n in walk(graph.node) if names.intersection(n.input)}


def test_no_node_copies_a_state(bundle, tmp_path):
    kept = [s.name for s in bundle.manifest.state if s.bytes_per_token]
    names = {piece_of(n, i) for n in kept for i in range(NEIGHBOURS + 1)}
    graph = executed(bundle.file(PIECES), tmp_path)
    assert names <= {i.name for i in graph.input}
    assert readers(graph, names) == {"FusedMatMul", "Shape"}  # products read it in place, transposed or not


def test_a_benchmark_opens_it_once(bundle):
    report = bench(bundle, [5], [2], threads=1, seconds=0)
    assert "request" in report.engines
    assert PIECES not in report.engines


def fed(session, request):
    """What the graph for pieces is given for a request."""
    engine, seen = session._model.pieces_scorer, {}

    class Watched:
        def run(self, inputs):
            seen.update(inputs)
            return engine.run(inputs)

    object.__setattr__(session._model, "pieces_scorer", Watched())
    session.score(request)
    object.__setattr__(session._model, "pieces_scorer", engine)
    return seen


def copied_bytes(model, feeds, folder):
    """Bytes that nodes wrote which do nothing but move values, in one run as ONNX Runtime tells of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "run")
    profiled = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    profiled.run(None, feeds)
    ran = [
        e["args"] for e in json.loads(Path(profiled.end_profiling()).read_text()) if "output_size" in e.get("args", {})
    ]
    assert ran
    return sum(int(one["output_size"]) for one in ran if one["op_name"] in MOVES)


def test_the_arrays_that_are_kept_are_those_that_are_read(session):
    _, apart = cut(session, 5, 3)
    session.score(apart)
    seen = fed(session, apart)
    states = [session._states.at_hand(session._model, user, 1) for user in ("ann", "n0")]
    for i, state in enumerate(states):
        rows = [s.name for s in session.manifest.state if s.bytes_per_token]
        assert rows
        assert all(seen[piece_of(n, i)] is state.tensors[n] for n in rows)


def test_one_of_a_batch_with_neighbours(session):
    whole, apart = cut(session, 5, 3)
    asked = [session._scoring.asked(session._model, [one], None)[0] for one in (whole, apart, whole)]
    expected = session.score(whole)
    for found in session._scoring.answers(asked, NEVER):
        np.testing.assert_allclose(found.scores, expected, **ROUNDING)


class Sharp(torch.nn.Module):
    """Logits far apart, so that nearly all weight may be on any token, of any piece."""

    def __init__(self) -> None:
        super().__init__()
        self.events, self.items = torch.nn.Embedding(50, 8), torch.nn.Embedding(50, 8)

    def forward(self, inputs):
        key, history = self.events(inputs["events"])[:, None], inputs["history_offsets"]
        query, lengths = self.items(inputs["items"])[:, None], history[1:] - history[:-1]
        attend = torch.ops.stca.target_history_attention
        return attend(query, key, key, inputs["target_offsets"], history, self.used(lengths), 60.0)[:, 0]

    def used(self, lengths):
        return lengths


def module_bundle(module, folder, inputs, pieces, **kwargs):
    torch.manual_seed(0)
    source = {"kind": "callable", "name": "made"}
    return export_module(
        RequestModel(module(), tuple(inputs)),
        folder,
        source=source,
        cut=CutOptions(pieces=pieces, flops_per_byte=0.01),  # so that keys are kept
        **kwargs,
    )


def test_weight_that_is_nearly_all_on_one_token(tmp_path):
    bundle = module_bundle(Sharp, tmp_path / "bundle", [*HISTORY, *TARGET], 3, prove=prove)
    assert [s["name"] for s in bundle.manifest.parity["stages"]][-2:] == ["session", "pieces"]
    session = Session.load(bundle.path, threads=1)
    rng = np.random.default_rng(0)
    events, items = rng.integers(0, 50, 300), np.arange(20)
    whole = session.score(Request({"events": events, "items": items}))
    near = [Request({"events": events[100:170]}), Request({"events": events[170:]})]
    found = session.answer(Request({"events": events[:100], "items": items}, neighbours=near))
    assert found.copied == 0
    np.testing.assert_allclose(found.scores, whole, rtol=0, atol=2e-4)  # logits of some hundreds have so many digits


def test_a_model_that_must_have_one_piece_says_so(tmp_path):
    device = TensorSpec("device", "float32", (1,), "request")
    single = [TensorSpec("events", "int64", (TOKENS,), "user", 50), device, TARGET[0]]

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.events, self.items = torch.nn.Embedding(50, 8), torch.nn.Embedding(50, 8)

        def forward(self, inputs):
            mixed = (self.events(inputs["events"]) * inputs["device"]).amax(0)
            return self.items(inputs["items"]) * mixed

    bundle = module_bundle(Pooled, tmp_path / "bundle", single, 3, prove=tiny.no_proof)
    assert PIECES not in bundle.manifest.graphs
    assert any("neighbours' states are not read where they lie" in n for n in bundle.manifest.split["notes"])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_states_in_eight_bits(bundle, tmp_path, kind):
    ranges = np.full((1, 1, 1), 4.0, np.float32)
    formats = {s.name: StateFormat(kind, "token", ranges) for s in bundle.manifest.state if s.dtype == "float32"}
    session = Session.load(write_quantized(bundle, formats, tmp_path / "q").path, threads=1)
    whole, apart = cut(session, 5, 3)
    found = session.answer(apart)
    np.testing.assert_allclose(found.scores, session.score(whole), **ROUNDING)
    assert found.copied == 0


def test_a_graph_for_pieces_that_is_wrong_does_not_pass(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "wrong")
    model = onnx.load(bundle.file(PIECES), load_external_data=False)
    attend = next(n for n in model.graph.node if n.op_type == "AttendPiece" and piece_of("x", 1)[1:] in n.input[1])
    attend.input[1:3] = [name.split("@")[0] for name in attend.input[1:3]]  # the first piece once more
    onnx.save(model, tmp_path / "wrong" / f"{PIECES}.onnx")
    wrong = seal(tmp_path / "wrong", bundle.manifest)
    with pytest.raises(ParityError, match="stage pieces differs"):
        prove(wrong)


def test_a_manifest_whose_pieces_are_others(bundle):
    manifest = bundle.manifest
    graph = manifest.graphs[PIECES]
    assert len(pieces_of(manifest)) == NEIGHBOURS
    for wrong in (graph.inputs[:-1], (*graph.inputs[1:], graph.inputs[0])):
        graphs = {**manifest.graphs, PIECES: dataclasses.replace(graph, inputs=wrong)}
        with pytest.raises(ValueError, match=f"graphs.{PIECES}: inputs: .* is not what the target scorer takes"):
            pieces_of(dataclasses.replace(manifest, graphs=graphs))
    with pytest.raises(ValueError, match="there are no pieces"):
        pieces_of(dataclasses.replace(manifest, appendable=False))


class Similar(torch.nn.Module):
    """SUIN's bias: β · similarity on the logits of a user's events, as one more column of the key."""

    def __init__(self) -> None:
        super().__init__()
        self.events, self.items = torch.nn.Embedding(50, 8), torch.nn.Embedding(50, 8)
        self.wide = torch.nn.Linear(8, 64)

    def forward(self, inputs):
        key, history = self.wide(self.events(inputs["events"])), inputs["history_offsets"]
        biased = torch.cat([key, 0.7 * inputs["similarity"][:, None]], dim=1)[:, None]
        query = self.wide(self.items(inputs["items"]))
        query = torch.cat([query, torch.ones_like(query[:, :1])], dim=1)[:, None]
        attend, lengths = torch.ops.stca.target_history_attention, history[1:] - history[:-1]
        return attend(query, biased, key[:, None], inputs["target_offsets"], history, lengths, 1.0)[:, 0, :2]


def test_a_similarity_for_each_user_copies_no_key(tmp_path):
    similarity = TensorSpec("similarity", "float32", (TOKENS,), "request")
    bundle = module_bundle(Similar, tmp_path / "bundle", [*HISTORY, similarity, *TARGET], 4, prove=prove)
    session = Session.load(bundle.path, threads=1)
    rng, items = np.random.default_rng(0), np.arange(5)
    events = rng.integers(0, 50, 900)

    ends = ((0, 300), (300, 700), (700, 900))
    for similar in ((1.0, 0.5, -3.0), tuple(rng.random(b - a, np.float32) for a, b in ends)):
        each = [np.broadcast_to(np.float32(x), b - a) for x, (a, b) in zip(similar, ends, strict=True)]
        rows = np.concatenate(each)
        whole = session.score(Request({"events": events, "similarity": rows, "items": items}))
        users = [{"events": events[a:b], "similarity": x} for x, (a, b) in zip(similar, ends, strict=True)]
        apart = Request({**users[0], "items": items}, neighbours=[Request(one) for one in users[1:]])
        np.testing.assert_allclose(session.score(apart), whole, rtol=0, atol=1e-5)
        feeds = fed(session, apart)
        kept = sum(x.nbytes for n, x in feeds.items() if "events" in n or "linear" in n)
        copied = copied_bytes(bundle.file(PIECES), feeds, tmp_path)
        if np.ndim(similar[0]):
            assert copied > 0.5 * kept  # where a bias is of each event, its column joins those of the key
        else:
            assert copied < 0.1 * kept  # of logits and of queries, for five targets


@pytest.mark.parametrize("low", [-1e9, -3e38, -np.inf])
def test_a_piece_that_a_bias_takes_all_weight_from(tmp_path, low):
    similarity = TensorSpec("similarity", "float32", (TOKENS,), "request")
    bundle = module_bundle(Similar, tmp_path / "bundle", [*HISTORY, similarity, *TARGET], 3, prove=tiny.no_proof)
    session, rng = Session.load(bundle.path, threads=1), np.random.default_rng(0)
    users = [{"events": rng.integers(0, 50, 20), "similarity": 1.0} for _ in range(3)]
    near = [Request(one) for one in users[1:]]
    feeds = fed(session, Request({**users[0], "items": np.arange(5)}, neighbours=near))
    inputs = bundle.manifest.graphs["target_scorer"].inputs
    apart, whole = (ort.InferenceSession(bundle.file(graph)) for graph in (PIECES, "target_scorer"))
    for biases in itertools.product((1.0, 0.2, low), repeat=3):
        if min(biases) == max(biases):
            continue
        feeds |= {piece_of("similarity", i): np.full(20, bias, np.float32) for i, bias in enumerate(biases)}
        rows = {
            s.name: np.concatenate([feeds[piece_of(s.name, i)] for i in range(3)])
            for s in inputs
            if s.shape[:1] == (TOKENS,)
        }
        joined = {
            s.name: np.array([0, 60], s.dtype) if s.is_offsets else feeds[s.name] for s in inputs if s.name not in rows
        }
        (expected,), (found,) = whole.run(None, {**rows, **joined}), apart.run(None, feeds)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(biases))


class Twice(Similar):
    """Two attentions over one key with a bias."""

    def forward(self, inputs):
        key, history = self.wide(self.events(inputs["events"])), inputs["history_offsets"]
        biased = torch.cat([key, inputs["similarity"][:, None]], dim=1)[:, None]
        query = self.wide(self.items(inputs["items"]))
        attend, lengths = torch.ops.stca.target_history_attention, history[1:] - history[:-1]
        found = []
        for scale in (1.0, 0.5):
            asked = torch.cat([scale * query, torch.ones_like(query[:, :1])], dim=1)[:, None]
            out = attend(asked, biased, key[:, None], inputs["target_offsets"], history, lengths, 1.0)
            found.append(out[:, 0, :1])
        return torch.cat(found, dim=1)


def test_two_attentions_over_one_biased_key(tmp_path):
    similarity = TensorSpec("similarity", "float32", (TOKENS,), "request")
    bundle = module_bundle(Twice, tmp_path / "bundle", [*HISTORY, similarity, *TARGET], 3, prove=tiny.no_proof)
    onnx.checker.check_model(str(bundle.file(PIECES)))
    session, events, items = Session.load(bundle.path, threads=1), np.arange(20), np.arange(5)
    rows = np.repeat(np.float32([1.0, 0.2]), 10)
    whole = session.score(Request({"events": events, "similarity": rows, "items": items}))
    near = [Request({"events": events[10:], "similarity": 0.2})]
    found = session.answer(Request({"events": events[:10], "similarity": 1.0, "items": items}, neighbours=near))
    assert found.copied == 0
    np.testing.assert_allclose(found.scores, whole, rtol=0, atol=1e-5)


class AllButOne(Sharp):
    def used(self, lengths):
        return torch.clamp(lengths - 1, min=0)


class AtMost(Sharp):
    def used(self, lengths):
        return torch.clamp(lengths, max=1_000)


@pytest.mark.parametrize("module", [AllButOne, AtMost])
def test_an_attention_over_less_than_the_history_is_not_parted(tmp_path, module):
    bundle = module_bundle(module, tmp_path / "bundle", [*HISTORY, *TARGET], 3, prove=tiny.no_proof)
    assert PIECES not in bundle.manifest.graphs
    assert any("does not read the whole history" in note for note in bundle.manifest.split["notes"])
