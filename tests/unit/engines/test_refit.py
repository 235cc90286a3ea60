"""New weights in old graphs: the digest and the scores of a fresh export, or one line and nothing changed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.errors import one_line

import stca.checks.engines
import stca.engines.refit
import stca.engines.tensorrt_backend
from stca import probe
from stca.bundle import Bundle, seal
from stca.engines.build import Workload, build
from stca.engines.cache import EngineCache
from stca.engines.refit import refit
from stca.errors import CheckpointError, EngineError, ParityError
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import load_checkpoint, save_checkpoint
from stca.manifest import WEIGHTS, EngineEntry
from stca.runtime import OnnxRuntimeEngine, Request, Session


@pytest.fixture(scope="module")
def new_checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("new") / "new.safetensors"
    save_checkpoint(file, tiny.module(tiny.config(), seed=7))
    return file


@pytest.fixture(scope="module")
def fresh(new_checkpoint, tmp_path_factory):
    """What an export of the new checkpoint gives."""
    out = tmp_path_factory.mktemp("fresh") / "B"
    return export_checkpoint(load_checkpoint(new_checkpoint), out, prove=tiny.no_proof, form="absorbed")


@pytest.fixture
def bundle(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "B")


def scores(root):
    session = Session.load(root, threads=1)
    specs = session.manifest.graphs["request"].inputs
    return session.score(Request(probe.single(specs, 9, 5, np.random.default_rng(3))))


def test_it_equals_a_fresh_export(bundle, new_checkpoint, fresh):
    told = []
    result = refit(bundle, new_checkpoint, progress=told.append)
    loaded = Bundle.load(bundle)
    assert result["weights"] == loaded.manifest.weights == fresh.manifest.weights
    assert (bundle / WEIGHTS).read_bytes() == (fresh.path / WEIGHTS).read_bytes()
    assert result["parity"]["passed"]
    assert result["parity"]["weights"] == fresh.manifest.weights
    assert loaded.manifest.parity == json.loads(json.dumps(result["parity"]))
    assert np.array_equal(scores(bundle), scores(fresh.path))
    assert told[0] == "reading the checkpoint"


def test_into_another_directory_the_graphs_are_shared(bundle, new_checkpoint, tmp_path):
    before, old_scores = tiny.contents(bundle), scores(bundle)
    refit(bundle, new_checkpoint, out=tmp_path / "new", prove=tiny.no_proof)
    assert tiny.contents(bundle) == before
    assert not np.array_equal(scores(tmp_path / "new"), old_scores)
    for name in ("request.onnx", "user_encoder.onnx", "target_scorer.onnx"):
        assert (tmp_path / "new" / name).samefile(bundle / name)
    assert not (tmp_path / "new" / WEIGHTS).samefile(bundle / WEIGHTS)
    for root in (bundle, tmp_path / "new"):
        onnx.load(Bundle.load(root).file("request"))  # which refuses weights that have two names


def test_a_session_swaps_to_it(bundle, new_checkpoint, fresh):
    session = Session.load(bundle, threads=1)
    specs = session.manifest.graphs["request"].inputs
    request = Request(probe.single(specs, 9, 5, np.random.default_rng(3)), user="u")
    session.score(request)
    refit(bundle, new_checkpoint, prove=tiny.no_proof)
    session.swap(bundle)
    assert np.array_equal(session.score(request), scores(fresh.path))


def test_a_checkpoint_in_half_precision_is_what_an_export_makes_of_it(bundle, new_checkpoint, tmp_path):
    half = tmp_path / "half.safetensors"
    metadata = {"stca.config": tiny.config().to_json()}
    save_file({n: t.bfloat16() for n, t in load_file(new_checkpoint).items()}, half, metadata)
    digest = refit(bundle, half, prove=tiny.no_proof)["weights"]
    out = export_checkpoint(load_checkpoint(half), tmp_path / "F", prove=tiny.no_proof, form="absorbed")
    assert digest == out.manifest.weights


def altered(source, target, **changes):
    """A copy of a checkpoint with tensors replaced, or dropped where the value is None."""
    tensors = {**load_file(source), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, target, {"stca.config": tiny.config().to_json()})
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task_out.bias": None}, ("'task_out.bias'",)),
        ({"unheard_of": torch.zeros(2)}, ("'unheard_of'",)),
        ({"task_out.bias": torch.zeros(3)}, ("'task_out.bias'", "[3]", "[2]")),
        ({"task_out.bias": torch.tensor([1.0, float("nan")])}, ("'task_out.bias'", "NaN")),
    ],
)
def test_a_checkpoint_that_does_not_fit(bundle, new_checkpoint, tmp_path, changes, words):
    wrong, before = altered(new_checkpoint, tmp_path / "wrong.safetensors", **changes), tiny.contents(bundle)
    with one_line(CheckpointError, *words):
        refit(bundle, wrong)
    assert tiny.contents(bundle) == before


def test_another_config(bundle, tmp_path):
    save_checkpoint(tmp_path / "wide.safetensors", tiny.module(tiny.config(width=48)))
    with one_line(CheckpointError, "width", "48", "24"):
        refit(bundle, tmp_path / "wide.safetensors")


def test_no_checkpoint(bundle, tmp_path):
    with one_line(CheckpointError, "no such"):
        refit(bundle, tmp_path / "nothing")


def test_weights_in_the_wrong_place_are_found(bundle, new_checkpoint, monkeypatch):
    """Two tensors of one shape change places on their way into the file: the proof is against the checkpoint."""
    read = stca.engines.refit._read

    def swapped(*args):
        tensors, module = read(*args)
        a, b = "query_norm.0.bias", "query_norm.1.bias"
        return {**tensors, a: tensors[b], b: tensors[a]}, module

    monkeypatch.setattr(stca.engines.refit, "_read", swapped)
    before = tiny.contents(bundle)
    with one_line(ParityError, "request_graph"):
        refit(bundle, new_checkpoint)
    assert tiny.contents(bundle) == before


def test_a_bundle_that_has_no_config_takes_its_weights_by_name(bundle, new_checkpoint, tmp_path):
    seal(bundle, dataclasses.replace(Bundle.load(bundle).manifest, model={"kind": "onnx"}))
    result = refit(bundle, new_checkpoint, out=tmp_path / "new")
    assert result["parity"]["reference"] == "float64 onnx.reference"
    for changes, words in (
        ({"task_out.bias": None}, ("'task_out.bias'",)),
        ({"task_out.bias": torch.zeros(3)}, ("'task_out.bias'", "[3]", "[2]")),
        ({"task_out.bias": torch.full((2,), float("inf"))}, ("'task_out.bias'", "infinite")),
    ):
        with one_line(CheckpointError, *words):
            refit(bundle, altered(new_checkpoint, tmp_path / "wrong.safetensors", **changes))
    with one_line(CheckpointError, "no such"):
        refit(bundle, tmp_path / "nothing")


def test_killed_midway_the_bundle_is_as_it_was(bundle, new_checkpoint):
    before = tiny.contents(bundle)
    code = (
        "import os, signal, sys, stca.engines.refit\n"
        "stca.engines.refit.refit(sys.argv[1], sys.argv[2], prove=lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle), str(new_checkpoint)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert tiny.contents(bundle) == before
    onnx.load(Bundle.load(bundle).file("request"))
    scores(bundle)


def test_onnxruntime_on_the_bundles_own_graphs_stays_and_typed_graphs_go(bundle, new_checkpoint):
    for precision in ("fp32", "fp16"):
        build(bundle, engine="onnxruntime", precision=precision)
    result = refit(bundle, new_checkpoint, prove=tiny.no_proof)
    assert {e["file"]: e["kept"] for e in result["engines"]} == {
        "user_encoder.onnx": True,
        "target_scorer.onnx": True,
        "user_encoder.onnxruntime.cpu.fp16.onnx": False,
        "target_scorer.onnxruntime.cpu.fp16.onnx": False,
    }
    assert all("stca build" in e["why"] for e in result["engines"] if not e["kept"])
    assert {e.key["weights"] for e in Bundle.load(bundle).manifest.engines} == {result["weights"]}
    assert [r["cache"] for r in build(bundle, engine="onnxruntime")] == ["hit", "hit"]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_an_engine_with_old_weights_is_left_out_and_the_next_build_says_why(bundle, new_checkpoint, tmp_path):
    cache = EngineCache(tmp_path / "cache")
    asked = {
        "engine": "tensorrt-rtx",
        "sm": 89,
        "precision": "bf16",
        "workload": Workload(targets_max=8),
        "cache": cache,
    }
    build(bundle, **asked)
    result = refit(bundle, new_checkpoint, prove=tiny.no_proof)
    assert [e["kept"] for e in result["engines"]] == [False, False]
    assert not Bundle.load(bundle).manifest.engines
    again = build(bundle, **asked, dry_run=True)
    assert all(r["why"].startswith("the weights changed") for r in again)


def test_the_same_weights_keep_every_engine(bundle, bundle_dir, tmp_path):
    """A checkpoint that was bundled before: nothing about its engines is out of date."""
    save_checkpoint(tmp_path / "same.safetensors", tiny.module(tiny.config()))
    for precision in ("fp32", "fp16"):
        build(bundle, engine="onnxruntime", precision=precision)
    before = Bundle.load(bundle).manifest
    result = refit(bundle, tmp_path / "same.safetensors", prove=tiny.no_proof)
    assert result["weights"] == before.weights
    assert [e["kept"] for e in result["engines"]] == [True] * 4
    after = Bundle.load(bundle).manifest
    assert after.engines == before.engines
    assert after.files == before.files
    assert [r["cache"] for r in build(bundle, engine="onnxruntime", precision="fp16")] == ["hit", "hit"]


def pair(mode):
    """Manifest entries of TensorRT plans for a GPU that is not here."""
    common = {"flavour": "tensorrt", "sm": 90, "precision": "fp32", "refit": mode, "profiles": [{"N_h": [1, 9, 9]}]}
    more = {"lowering": "plugin", "weights": "old", "requests": 1}
    return [
        EngineEntry.of(
            {
                **common,
                "graph": half,
                "file": f"{half}.tensorrt.sm90.fp32.plan",
                "key": {**common, **more, "graph": half},
            }
        )
        for half in ("user_encoder", "target_scorer")
    ]


@pytest.fixture
def planned(bundle):
    """A function that gives the bundle such plans."""

    manifest = Bundle.load(bundle).manifest

    def write(mode):
        for entry in pair(mode):
            (bundle / entry.file).write_bytes(b"old plan")
        seal(bundle, dataclasses.replace(manifest, engines=tuple(pair(mode))))

    return write


@pytest.mark.parametrize(
    ("mode", "words"), [("identical", ("identical", "--refit weights")), ("none", ("stca build",))]
)
def test_engines_not_built_for_new_weights_are_not_given_any(bundle, planned, new_checkpoint, monkeypatch, mode, words):
    """TensorRT's identical-refit flag promises nothing for other weights, so it is not asked."""
    planned(mode)
    monkeypatch.setattr(stca.engines.tensorrt_backend, "build_plan", pytest.fail)
    result = refit(bundle, new_checkpoint, prove=tiny.no_proof)
    assert [e["kept"] for e in result["engines"]] == [False, False]
    assert all(word in e["why"] for e in result["engines"] for word in words)
    assert not Bundle.load(bundle).manifest.engines
    assert not list(bundle.glob("*.plan"))


@pytest.mark.parametrize("right", [True, False, "fails"])
def test_engines_built_for_new_weights_get_them_and_are_checked(
    bundle, planned, new_checkpoint, monkeypatch, tmp_path, right
):
    """As far as a CPU allows: the jobs that a process with a GPU is given, and engines of ONNX Runtime in their place.

    The wrong ones stand for a refit that left the old weights in.
    """
    planned("weights")
    jobs, stale = [], shutil.copytree(bundle, tmp_path / "stale")

    def refitted(job, progress):
        jobs.append(job)
        Path(job.plan).write_bytes(b"refitted")

    def opened(fresh, choice, *, threads):
        assert {e.file for e in choice.entries.values()} == {e.file for e in pair("weights")}
        if right == "fails":
            raise EngineError("out of memory")
        root = fresh.path if right else stale
        return {half: OnnxRuntimeEngine(root / f"{half}.onnx", threads=threads) for half in choice.entries}

    monkeypatch.setattr(stca.engines.tensorrt_backend, "build_plan", refitted)
    monkeypatch.setattr(stca.checks.engines, "open_engines", opened)
    cache = EngineCache(tmp_path / "cache")
    result = refit(bundle, new_checkpoint, prove=tiny.no_proof, cache=cache)
    assert [Path(job.refit_from).name for job in jobs] == [e.file for e in pair("weights")]
    assert {(job.flavour, job.precision, job.refit, job.sm, job.lowering) for job in jobs} == {
        ("tensorrt", "fp32", "weights", 90, "plugin")
    }
    assert all(job.profiles == [{"N_h": [1, 9, 9]}] for job in jobs)
    assert [e["kept"] for e in result["engines"]] == [right is True] * 2
    entries = Bundle.load(bundle).manifest.engines
    if right is True:
        assert [(bundle / e.file).read_bytes() for e in entries] == [b"refitted"] * 2
        assert {e.key["weights"] for e in entries} == {result["weights"]}
        assert sorted(e["graph"] for e in cache.known()) == ["target_scorer", "user_encoder"]
    else:
        assert ("out of memory" if right else "differs") in result["engines"][0]["why"]
        assert not entries
        assert not list(bundle.glob("*.plan"))
        assert not cache.known()
