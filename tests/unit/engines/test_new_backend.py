"""A backend is one module and one line in the table: a toy goes all the way that ONNX Runtime and TensorRT go."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.errors import one_line

from stca import probe
from stca.backends import BACKENDS, Backend
from stca.bundle import Bundle
from stca.checks.engines import verify_engine
from stca.checks.timing import measure
from stca.engines.build import build
from stca.errors import BuildError
from stca.runtime import Request, Session
from stca.runtime.engine_choice import best_engine


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(BACKENDS, "toy", Backend("support.toy_backend:SERVER", "support.toy_backend:BUILDER"))


@pytest.mark.usefixtures("toy")
def test_a_toy_backend_builds_verifies_serves_and_is_timed(bundle_dir, tmp_path):
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    assert [r["cache"] for r in build(root, engine="toy")] == ["miss", "miss"]
    assert [r["cache"] for r in build(root, engine="toy")] == ["hit", "hit"]
    bundle = Bundle.load(root)
    assert [e.file for e in bundle.manifest.engines] == ["user_encoder.toy.plan", "target_scorer.toy.plan"]
    choice = best_engine(bundle.manifest)
    assert choice.flavour == "toy"
    assert verify_engine(bundle, choice, probes=((3, 2), (9, 4))).passed

    served, own = Session.load(root, engine="toy"), Session.load(root, engine="graphs")
    assert served.engines["target_scorer"] == "toy"
    inputs = probe.single(bundle.manifest.graphs["request"].inputs, 7, 3, np.random.default_rng(0))
    np.testing.assert_allclose(served.score(Request(inputs)), own.score(Request(inputs)), atol=1e-5)
    assert np.median(measure(lambda: served.score(Request(inputs)), 0.05)) > 0


@pytest.mark.usefixtures("toy")
def test_what_a_backend_cannot_build_it_says(bundle_dir, tmp_path):
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    with one_line(BuildError, "toy", "float32"):
        build(root, engine="toy", precision="fp16")


def test_an_engine_that_nobody_registered(bundle_dir):
    with one_line(BuildError, "'toy'", "tensorrt-rtx", "onnxruntime"):
        build(bundle_dir, engine="toy")
    with one_line(BuildError, "'toy'", "tensorrt-rtx", "onnxruntime"):
        Session.load(bundle_dir, engine="toy")
