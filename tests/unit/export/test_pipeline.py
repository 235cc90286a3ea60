"""From a checkpoint or an ONNX file to a bundle: what it records, that it is repeatable, and what a failure leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import parser
from support import tiny
from support.errors import one_line
from torch import nn

from stca import probe
from stca.bundle import Bundle, sha256_of
from stca.errors import BundleError, ExportError, ParityError, SplitError, UsageError
from stca.export.analysis.cost import DEFAULT_WORKLOAD
from stca.export.modules import resolve
from stca.export.pipeline import CutOptions, choose_form, export_module, split_onnx
from stca.export.reference.checkpoint import load_checkpoint
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
        export_module(
            RequestModel(Untraceable(), (TensorSpec("x", "float32", ("N_t",), "target"),)),
            tmp_path / "thesis",
            prove=fail,
            source={},
        )
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
