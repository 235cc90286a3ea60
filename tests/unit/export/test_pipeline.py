"""From a checkpoint or an ONNX file to a bundle: what it records, that it is repeatable, and what a failure leaves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, parser
from support import tiny
from support.errors import one_line
from torch import nn

from stca import probe
from stca.bundle import Bundle, sha256_of
from stca.checks.verify import prove
from stca.errors import BundleError, ExportError, ParityError, SplitError, UsageError
from stca.export.analysis.cost import DEFAULT_WORKLOAD
from stca.export.analysis.scope import Scope, infer_scopes
from stca.export.modules import resolve
from stca.export.pipeline import CutOptions, choose_form, export_checkpoint, export_module, split_onnx
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.reference.module import segment_of
from stca.export.state import not_one_users
from stca.export.to_onnx import RequestModel
from stca.manifest import MANIFEST, WEIGHTS
from stca.runtime import Request, Session
from stca.specs import TensorSpec

SCOPES = {
    **{f"history_{n}": "user" for n in ("item", "action", "category", "time", "gap", "offsets")},
    "user_segment": "user",
    "request_device": "request",
    **{f"target_{n}": "target" for n in ("item", "category", "offsets")},
}


@pytest.mark.parametrize(
    ("width", "heads", "targets", "form"),
    [
        (1024, 16, 68, "absorbed"),  # model.md: they break even at m = d / (h - 1) = 68.3
        (1024, 16, 69, "projected"),
        (1024, 16, 300, "projected"),
        (1024, 16, 1, "absorbed"),
        (256, 8, 36, "absorbed"),
        (256, 8, 37, "projected"),
        (64, 1, 10_000, "absorbed"),  # with one head absorbing costs nothing
    ],
)
def test_the_form_with_less_work(width, heads, targets, form):
    assert choose_form(tiny.config(width=width, heads=heads), targets) == form


@pytest.mark.parametrize("form", ["projected", "absorbed"])
def test_what_a_bundle_records(exported, checkpoint_file, form):
    bundle = Bundle.load(exported("log", form))
    m = bundle.manifest
    assert set(os.listdir(bundle.path)) == {MANIFEST, WEIGHTS, *(f"{g}.onnx" for g in m.graphs)}
    assert (m.attention, m.precision, m.max_history, m.appendable) == (form, "float32", tiny.MAX_HISTORY, True)
    assert m.model["kind"] == "stca"
    assert m.weights == sha256_of(bundle.path / WEIGHTS)
    scopes = {s.name: s.scope for s in m.graphs["request"].inputs}
    assert scopes == SCOPES
    assert {scopes[s.name] for s in m.graphs["user_encoder"].inputs} == {"user"}
    state = {s.name for s in m.state}
    assert {s.name for s in m.graphs["user_encoder"].outputs} == state
    from_outside = {s.name for s in m.graphs["target_scorer"].inputs} - state
    assert {scopes[n] for n in from_outside} == {"request", "target"}
    assert m.split["state_bytes"] >= tiny.MAX_HISTORY * m.split["bytes_per_token"]
    assert m.split["bytes_per_token"] == sum(s.bytes_per_token for s in m.state)


def test_a_time_delta_is_reported_with_its_path_and_price(exported, capsys):
    """Tokens that depend on the request cannot be kept: the state is the raw history, and the report says why."""
    delta = Bundle.load(exported("delta", "projected")).manifest
    log = Bundle.load(exported("log", "projected")).manifest
    assert not log.split["request_dependencies"]
    (dependency,) = delta.split["request_dependencies"]
    assert dependency["path"][0] == "request_time"
    assert dependency["path"][-1] == dependency["value"]
    assert set(dependency["encodings"]) == {f"attention_{i}_{r}" for i in (0, 1) for r in ("key", "value")}
    assert "request_time" in dependency["text"]
    assert "cannot be cached" in dependency["text"]
    # The price: all that the other model caches, and about the work its encoder does for the longest history.
    assert dependency["bytes"] == tiny.MAX_HISTORY * log.split["bytes_per_token"]
    cached_work = log.split["user_work"] - log.split["recomputed_work"]
    assert 0.9 * cached_work < dependency["flops"] < 1.1 * cached_work + tiny.MAX_HISTORY * 100
    # The state is ids and buckets: integers, and no attention encoding among them.
    assert {s.dtype for s in delta.state} <= {"int64", "int32"}
    assert {s.input for s in delta.state} >= {"history_item", "history_action", "history_category", "history_time"}
    assert {s.dtype for s in log.state if s.bytes_per_token} == {"float32"}


def test_equal_weights_have_equal_digests_whatever_the_form(exported):
    digests = {Bundle.load(exported(*e)).manifest.weights for e in (("log", "projected"), ("log", "absorbed"))}
    assert len(digests) == 1
    assert Bundle.load(exported("delta", "projected")).manifest.weights not in digests


EXPORT_AND_DIE = """
import os, shutil, signal, sys
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.pipeline import export_checkpoint

def killed(bundle, _):
    shutil.copytree(bundle.path, sys.argv[3])
    os.kill(os.getpid(), signal.SIGKILL)

export_checkpoint(load_checkpoint(sys.argv[1]), sys.argv[2], prove=killed, form="absorbed")
"""


def test_an_export_killed_before_its_end_and_what_it_had_written(tmp_path, bundle_dir, checkpoint_file):
    """In another process with another hash seed, replacing an existing bundle; killed when all files are written."""
    out, seen = tmp_path / "out" / "B", tmp_path / "seen"
    shutil.copytree(bundle_dir, out)
    (out / "request.onnx").rename(out / "x")  # any bundle but the one being made
    (out / "x").rename(out / "request.onnx")
    before = tiny.contents(out)
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_AND_DIE, checkpoint_file("log"), out, seen],
        env={**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert tiny.contents(out) == before
    Bundle.load(out)
    left = [p for p in out.parent.iterdir() if p != out]
    assert [p.name.startswith(".B.") and p.name.endswith(".tmp") for p in left] == [True]
    # What it had written is, bit for bit, what this process made of the same checkpoint.
    made, expected = tiny.contents(seen), tiny.contents(bundle_dir)
    assert made.keys() == expected.keys()
    for name in made:
        assert made[name] == expected[name], name


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_proof_leaves_the_existing_bundle_as_it_was(tmp_path, bundle_dir):
    out = tmp_path / "B"
    shutil.copytree(bundle_dir, out)
    before = tiny.contents(tmp_path)

    def refuse(bundle, _):
        assert Bundle.load(bundle.path).manifest.to_json() == bundle.manifest.to_json(), "a prover sees a whole bundle"
        assert bundle.path != out
        raise ParityError("stage x differs")

    def interrupt(*_):
        raise KeyboardInterrupt

    with one_line(ParityError, "stage x differs"):
        split_onnx(bundle_dir / "request.onnx", SCOPES, out, prove=refuse)
    assert tiny.contents(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        split_onnx(bundle_dir / "request.onnx", SCOPES, out, prove=interrupt)
    assert tiny.contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["B"]


def fail(*_):
    raise ParityError("stage x differs")


def test_a_failed_first_export_leaves_nothing(tmp_path, bundle_dir):
    with one_line(ParityError):
        split_onnx(bundle_dir / "request.onnx", SCOPES, tmp_path / "B", prove=fail)
    assert not list(tmp_path.iterdir())


class Untraceable(nn.Module):
    def forward(self, inputs):
        raise AssertionError("was traced")


def test_a_place_that_is_no_bundle_is_refused_before_any_work(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with one_line(BundleError, "thesis", "not a bundle"):
        export_module(RequestModel(Untraceable(), USERS_ITEMS), tmp_path / "thesis", prove=fail, source={})
    with one_line(BundleError, "thesis", "not a bundle"):
        split_onnx(tmp_path / "none.onnx", SCOPES, tmp_path / "thesis", prove=fail)
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


THEIRS = """
import json

class Odd:
    def __str__(self):
        return "two\\nlines"

def helper():
    raise ValueError(Odd())

def direct():
    helper()

def through_a_library():
    return json.loads("{")

def needs_one(argument):
    pass

value = 5
"""


def test_what_their_own_function_raises_is_said_to_be_theirs(tmp_path, monkeypatch):
    (tmp_path / "their_module.py").write_text(THEIRS)
    (tmp_path / "their_broken.py").write_text("x = 1\ny = x['a']\n")
    (tmp_path / "their_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    file = str(tmp_path / "their_module.py")
    for name, words in {
        "their_module:direct": ("your function raised ValueError: two lines", f"at {file}:9;"),
        "their_module:through_a_library": ("your function raised JSONDecodeError", f"at {file}:15;"),
        "their_module:needs_one": ("your function raised TypeError", "'argument'"),
        "their_module:value": ("your function raised TypeError", "not callable"),
        "their_module:nothing": ("AttributeError", "'nothing'", "PACKAGE.MODULE:CALLABLE"),
        "their_broken:f": ("your module raised TypeError", f"at {tmp_path / 'their_broken.py'}:2;"),
        "their_syntax:f": ("SyntaxError", "their_syntax.py, line 1"),
        "no.such:thing": ("ModuleNotFoundError", "PACKAGE.MODULE:CALLABLE"),
        "their_module:Odd": ("returned Odd", "RequestModel"),
    }.items():
        with one_line(ExportError, f"--model {name}", *words):
            resolve(name)


def test_a_misspelt_size_is_refused(tmp_path, bundle_dir):
    cut = CutOptions(workload={**DEFAULT_WORKLOAD, "N_H": 5})
    with one_line(SplitError, "'N_H'", "there are N_h, B_plus_1, B, N_t"):
        split_onnx(bundle_dir / "request.onnx", SCOPES, tmp_path / "B", prove=fail, cut=cut)
    with one_line(SplitError, "'tokens'", "there are N_h, B_plus_1, B, N_t"):
        export_module(
            RequestModel(Attends("event"), USERS_ITEMS),
            tmp_path / "B",
            prove=fail,
            source={},
            cut=CutOptions(workload={"tokens": 5}),
        )
    assert not (tmp_path / "B").exists()


# --- ONNX files of others ---------------------------------------------------------------------------------------------


def test_split_of_the_request_graph_gives_the_same_scores(tmp_path, bundle_dir):
    out = split_onnx(bundle_dir / "request.onnx", SCOPES, tmp_path / "B", prove=tiny.no_proof)
    a, b = Session.load(bundle_dir, threads=1), Session.load(out.path, threads=1)
    specs = a.manifest.graphs["request"].inputs
    request = Request(probe.single(specs, 9, 5, np.random.default_rng(0)))
    assert np.array_equal(a.score(request), b.score(request))
    assert out.manifest.weights == a.manifest.weights
    limits = {s.name: s.limit for s in out.manifest.graphs["request"].inputs}
    assert limits == {s.name: s.limit for s in specs}, "id limits are read off the tables"


def test_bad_files(tmp_path, bundle_dir):
    def refused(file, *words, scopes=SCOPES, kind=SplitError):
        with one_line(kind, *words):
            split_onnx(file, scopes, tmp_path / "B", prove=fail)

    refused(tmp_path / "none.onnx", "none.onnx", "no such")
    (tmp_path / "garbage.onnx").write_bytes(b"\xffgarbage")
    refused(tmp_path / "garbage.onnx", "garbage.onnx", "not an ONNX")
    (tmp_path / "empty.onnx").write_bytes(b"")
    refused(tmp_path / "empty.onnx", "empty.onnx")
    (tmp_path / "dir.onnx").mkdir()
    refused(tmp_path / "dir.onnx", "dir.onnx")
    shutil.copy(bundle_dir / "request.onnx", tmp_path / "alone.onnx")
    refused(tmp_path / "alone.onnx", "alone.onnx", "weights.safetensors")
    data = (bundle_dir / "request.onnx").read_bytes()
    (tmp_path / "short.onnx").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "short.onnx", "short.onnx")
    refused(bundle_dir / "request.onnx", "'nothing'", "history_item", scopes={**SCOPES, "nothing": "user"})
    without = {n: s for n, s in SCOPES.items() if n != "history_gap"}
    refused(bundle_dir / "request.onnx", "'history_gap'", "scope", scopes=without)
    odd = {**SCOPES, "history_gap": "session"}
    refused(bundle_dir / "request.onnx", "'history_gap'", "scope 'session'", scopes=odd, kind=UsageError)
    unknown = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N_h] u, float[N_t] t) => (float[N_t] y) '
        "{ y = Frobnicate (u, t) }"
    )
    (tmp_path / "unknown.onnx").write_bytes(unknown.SerializeToString())
    refused(tmp_path / "unknown.onnx", "unknown.onnx", "Frobnicate", scopes={"u": "user", "t": "target"})
    assert not (tmp_path / "B").exists()


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret", "link"])
def test_weights_outside_the_models_directory_are_not_read(tmp_path, bundle_dir, location):
    (tmp_path / "secret").write_bytes(bytes(100_000))
    home = tmp_path / "model"
    (home / "sub").mkdir(parents=True)
    (home / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(bundle_dir / "request.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (home / "request.onnx").write_bytes(model.SerializeToString())
    with one_line(SplitError, "request.onnx", "outside"):
        split_onnx(home / "request.onnx", SCOPES, tmp_path / "B", prove=fail)


def test_weights_of_a_constant_outside_the_models_directory_are_not_read(tmp_path):
    """External data may hide in an attribute, not only among the initializers."""
    (tmp_path / "secret").write_bytes(bytes(40))
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N_h] u, float[N_t] t) => (float[N_t] y) '
        "{ c = Constant <value = float[10] {0,0,0,0,0,0,0,0,0,0}> () m = ReduceSum (c) s = ReduceSum (u) "
        "k = Mul (s, m) y = Mul (t, k) }"
    )
    constant = model.graph.node[0].attribute[0].t
    constant.ClearField("float_data")
    constant.raw_data = b""
    constant.data_location = onnx.TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="../secret")
    home = tmp_path / "model"
    home.mkdir()
    (home / "m.onnx").write_bytes(model.SerializeToString())
    with one_line(SplitError, "m.onnx"):
        split_onnx(home / "m.onnx", {"u": "user", "t": "target"}, tmp_path / "B", prove=fail)


# --- modules of others ------------------------------------------------------------------------------------------------

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
        export_module(model, tmp_path / "B", prove=fail, source={"kind": "callable"})
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


def test_two_exports_at_once_into_one_place(tmp_path, bundle_dir):
    """Whoever is last wins; what is there is always whole."""
    seen = []

    def overtaken(bundle, _):
        if not seen:
            seen.append(split_onnx(bundle_dir / "request.onnx", SCOPES, tmp_path / "B", prove=tiny.no_proof))
            assert Bundle.load(tmp_path / "B").manifest.to_json() == seen[0].manifest.to_json()
        return {"passed": True}

    split_onnx(bundle_dir / "request.onnx", SCOPES, tmp_path / "B", prove=overtaken)
    assert Bundle.load(tmp_path / "B").manifest.parity == {"passed": True}
    assert os.listdir(tmp_path) == ["B"]


def test_the_trained_checkpoint_is_not_changed_by_its_export(checkpoint_file, exported):
    before = sha256_of(checkpoint_file("log"))
    exported("log", "absorbed")
    assert sha256_of(checkpoint_file("log")) == before
    assert load_checkpoint(checkpoint_file("log")).config == tiny.config()
