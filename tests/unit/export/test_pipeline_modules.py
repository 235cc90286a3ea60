"""Modules of others through the whole pipeline: which tokens can be appended, what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, parser
from support import tiny
from support.errors import one_line
from torch import nn

from stca.checks.verify import prove
from stca.errors import ExportError, ParityError, SplitError
from stca.export.analysis.scope import Scope, infer_scopes
from stca.export.pipeline import CutOptions, export_checkpoint, export_module, split_onnx
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.reference.module import segment_of
from stca.export.state import not_one_users
from stca.export.to_onnx import RequestModel
from stca.runtime import Request, Session
from stca.specs import TensorSpec

WIDTH = 32
USERS_ITEMS = (
    TensorSpec("history_item", "int64", ("N_h",), "user", 50),
    TensorSpec("history_offsets", "int32", ("B_plus_1",), "user"),
    TensorSpec("user_segment", "int64", ("B",), "user", 5),
    TensorSpec("target_item", "int64", ("N_t",), "target", 50),
    TensorSpec("target_offsets", "int32", ("B_plus_1",), "target"),
)


class Attends(nn.Module):
    """One attention over encoded items; `mode` says what else a history token depends on."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        generator = torch.Generator().manual_seed(0)
        self.items = nn.Parameter(torch.randn(50, WIDTH, generator=generator))
        self.segments = nn.Parameter(torch.randn(5, WIDTH, generator=generator))
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        self.taps = nn.Parameter(torch.randn(WIDTH, 1, 2, generator=generator))

    def forward(self, inputs):
        history, targets = inputs["history_offsets"], inputs["target_offsets"]
        x = self.items[inputs["history_item"]]
        own = segment_of(x.shape[0], history)
        if self.mode == "user":
            x = x + self.segments[inputs["user_segment"]].index_select(0, own)
        elif self.mode == "position":
            place = torch.arange(x.shape[0]) - history[:-1].to(torch.int64).index_select(0, own)
            x = x + place.unsqueeze(1) * 0.1
        elif self.mode == "far":  # a causal convolution: each token and the one 500 before it
            padded = nn.functional.pad(x.T.unsqueeze(0), (500, 0))
            x = nn.functional.conv1d(padded, self.taps, dilation=500, groups=WIDTH).squeeze(0).T
        elif self.mode == "mixed":
            x = x + x.sum(0) / (x.shape[0] + 1)
        x = (torch.relu(x @ self.w) @ self.w).unsqueeze(1)
        q = self.items[inputs["target_item"]]
        o = torch.ops.stca.target_history_attention(
            q.unsqueeze(1), x, x, targets, history, history[1:] - history[:-1], 0.2
        )
        user = self.segments[inputs["user_segment"]].index_select(0, segment_of(q.shape[0], targets))
        y = (o.squeeze(1) * q).sum(1, keepdim=True) + user.sum(1, keepdim=True)
        return (y, -y) if self.mode == "two outputs" else y


@pytest.fixture(scope="module")
def of_module(tmp_path_factory):
    def export(mode):
        out = tmp_path_factory.mktemp("modules") / "B"
        outputs = ("scores", "other") if mode == "two outputs" else ("scores",)
        model = RequestModel(Attends(mode), USERS_ITEMS, outputs)
        return export_module(model, out, prove=tiny.no_proof, source={"kind": "callable", "name": "x"}, max_history=64)

    return export


def test_tokens_of_their_own_events_are_appendable(of_module):
    bundle = of_module("event")
    assert bundle.manifest.appendable
    session = Session.load(bundle.path, threads=1)
    history, user = np.array([3, 1, 4, 1, 5, 9]), {"user_segment": 3, "target_item": [2, 7]}
    whole = session.score(Request({"history_item": history, **user}))
    session.score(Request({"history_item": history[:4], **user}, user="u", version=4))
    assert session.append("u", {"history_item": history[4:]}, version=6)
    appended = session.score(Request({"target_item": [2, 7]}, user="u", version=6))
    np.testing.assert_allclose(appended, whole, rtol=1e-5, atol=1e-5)


def test_tokens_that_know_their_position_are_not_appendable(of_module):
    assert not of_module("position").manifest.appendable


def test_tokens_that_look_further_back_than_any_check_are_not_appendable(of_module):
    """A convolution that reaches 500 tokens back does nothing to the shorter histories of the checks."""
    manifest = of_module("far").manifest
    assert not manifest.appendable
    (note,) = (n for n in manifest.split["notes"] if "appended" in n)
    assert "which is not known to keep tokens apart" in note


def test_a_model_that_mixes_the_requests_of_a_batch_is_refused(tmp_path):
    model = RequestModel(Attends("mixed"), USERS_ITEMS)
    with one_line(ParityError, "the others in its batch"):
        export_module(model, tmp_path / "B", prove=prove, source={"kind": "callable"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("price", "proof"), [(0.01, prove), (1.0, tiny.no_proof)])
def test_no_place_in_the_batch_is_kept_at_any_price(tmp_path, checkpoint_file, price, proof):
    """The number of a token's request, say: cheap to keep where work is dear, and wrong in the next batch."""
    checkpoint, cut = load_checkpoint(checkpoint_file("delta")), CutOptions(flops_per_byte=price)
    bundle = export_checkpoint(checkpoint, tmp_path / "B", prove=proof, form="projected", cut=cut)
    state = {s.name: s for s in bundle.manifest.state}
    assert any(s.input is None for s in state.values())
    assert {s.shape[0] for s in state.values()} == {"N_h", "B", "B_plus_1"}
    assert [s.input for s in state.values() if s.shape[0] == "B_plus_1"] == ["history_offsets"]


def test_what_is_not_one_users_own():
    """By computing several users together and apart; what follows from offsets alone is made again."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> g (int64[N_h] ids, int32[B_plus_1] offsets, float[B, 2] u,
            float[N_t, 2] t, int32[B_plus_1] t_offsets) => (float[N_t, 2] y)
        {
            own = Relu (u)
            token = Add (ids, ids)
            count = Shape (ids)
            zero = Constant <value: tensor = int64 {0}> ()
            one = Constant <value: tensor = int64 {1}> ()
            last = Squeeze (count)
            place = Range (zero, last, one)
            running = CumSum (ids, zero)
            first_axis = Constant <value: tensor = int64[1] {0}> ()
            mean = ReduceMean (u, first_axis)
            from1 = Constant <value: tensor = int64[1] {1}> ()
            to_last = Constant <value: tensor = int64[1] {-1}> ()
            to_end = Constant <value: tensor = int64[1] {99}> ()
            begins = Slice (offsets, first_axis, to_last)
            ends = Slice (offsets, from1, to_end)
            lengths = Sub (ends, begins)
            all = Sum (u, mean)
            sizes = Cast <to: int = 1> (lengths)
            column = Unsqueeze (sizes, from1)
            by_size = Mul (u, column)
            y = Identity (t)
        }"""
    )
    inputs = (
        TensorSpec("ids", "int64", ("N_h",), "user", 50),
        TensorSpec("offsets", "int32", ("B_plus_1",), "user"),
        TensorSpec("u", "float32", ("B", 2), "user"),
        TensorSpec("t", "float32", ("N_t", 2), "target"),
        TensorSpec("t_offsets", "int32", ("B_plus_1",), "target"),
    )
    scopes = infer_scopes(model, {s.name: s.scope for s in inputs})
    user = {n for node in model.graph.node for n in node.output if scopes[n] == Scope.USER}
    assert user - not_one_users(model, scopes, inputs) == {"own", "token", "by_size"}
    assert not_one_users(model, scopes, inputs) >= {"count", "place", "running", "mean", "lengths", "column", "all"}
    alone = [dataclasses.replace(s, shape=tuple({"B_plus_1": 2}.get(n, n) for n in s.shape)) for s in inputs]
    assert not_one_users(model, scopes, alone) == frozenset(), "without batches there is none to be wrong in"


def test_tokens_that_depend_on_the_user_are_not_appendable(of_module):
    """`append` is not told the user's attributes, so a token encoded with them cannot be made by it."""
    assert not of_module("user").manifest.appendable


def test_a_module_with_another_number_of_outputs_than_named(tmp_path):
    model = RequestModel(Attends("two outputs"), USERS_ITEMS, ("a", "b", "c"))
    with one_line(ExportError, "scores_0, scores_1", "a, b, c"):
        export_module(model, tmp_path / "B", prove=tiny.no_proof, source={"kind": "callable"})
    assert not list(tmp_path.iterdir())


def test_graph_inputs_with_defaults_are_weights(tmp_path):
    """Old exporters list initializers among the inputs too."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N_h, 8] u, float[N_t, 8] t, float[8, 8] w) '
        "=> (float[N_t] y) { a = MatMul (u, w) s = ReduceSum <keepdims = 1> (a) p = Mul (t, s) "
        "r = Constant <value = int64[1] {1}> () y = ReduceSum <keepdims = 0> (p, r) }"
    )
    model.graph.initializer.append(helper.make_tensor("w", 1, [8, 8], np.ones(64, np.float32)))
    onnx.save(model, tmp_path / "m.onnx")
    bundle = split_onnx(tmp_path / "m.onnx", {"u": "user", "t": "target"}, tmp_path / "B", prove=tiny.no_proof)
    assert [s.name for s in bundle.manifest.graphs["request"].inputs] == ["u", "t"]
    scores = Session.load(Path(bundle.path), threads=1).score(
        Request({"u": np.ones((2, 8), np.float32), "t": np.ones((3, 8), np.float32)})
    )
    np.testing.assert_allclose(scores, np.full((3, 1), 8 * 128.0))


def test_a_misspelt_size_is_refused(tmp_path):
    model, cut = RequestModel(Attends("event"), USERS_ITEMS), CutOptions(workload={"tokens": 5})
    with one_line(SplitError, "'tokens'", "there are N_h, B_plus_1, B, N_t"):
        export_module(model, tmp_path / "B", prove=tiny.no_proof, source={}, cut=cut)
    assert not (tmp_path / "B").exists()
