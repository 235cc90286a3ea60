"""Which engines a session takes, and what it says of those it does not."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from support.errors import one_line

from stca.bundle import Bundle
from stca.engines.build import build
from stca.errors import BuildError
from stca.manifest import EngineEntry
from stca.runtime import Session, model
from stca.runtime.engine_choice import Choice, Machine, best_engine, open_engines

CPU = Machine()
GPU = Machine(
    89,
    {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"},
    ("CUDAExecutionProvider", "CPUExecutionProvider"),
)


def entries(flavour, precision, sm=None, provider=None, halves=("user_encoder", "target_scorer"), version=None):
    version = version or GPU.versions.get(flavour, "1")
    made = {"flavour": flavour, "precision": precision, "sm": sm, "version": version}
    return [EngineEntry.of({**made, "graph": half, "file": half, "provider": provider}) for half in halves]


@pytest.fixture
def manifest(bundle_dir):
    manifest = Bundle.load(bundle_dir).manifest
    return lambda *engines: dataclasses.replace(manifest, engines=tuple(e for pair in engines for e in pair))


ALL = (
    entries("onnxruntime", "fp16", provider="CPUExecutionProvider"),
    entries("onnxruntime", "fp32", provider="CPUExecutionProvider"),
    entries("onnxruntime", "fp16", provider="CUDAExecutionProvider"),
    entries("tensorrt-rtx", "fp32", 89),
    entries("tensorrt-rtx", "bf16", 89),
    entries("tensorrt", "bf16", 89),
    entries("tensorrt", "bf16", 90),
)


def test_the_fastest_that_runs(manifest):
    order = []
    pairs = list(ALL)
    while pairs:
        choice = best_engine(manifest(*pairs), GPU)
        if not choice.entries:  # what is left is slower than the bundle's own graphs
            assert [line.partition(":")[0] for line in choice.passed_over] == ["onnxruntime fp16"]
            assert best_engine(manifest(*pairs), GPU, only="onnxruntime").precision == "fp16"
            break
        order.append((choice.flavour, choice.precision, choice.entries["target_scorer"].provider))
        pairs = [p for p in pairs if (p[0].flavour, p[0].precision, p[0].provider) != order[-1]]
    assert order == [
        ("tensorrt", "bf16", None),
        ("tensorrt-rtx", "bf16", None),
        ("tensorrt-rtx", "fp32", None),
        ("onnxruntime", "fp16", "CUDAExecutionProvider"),
        ("onnxruntime", "fp32", "CPUExecutionProvider"),
    ]


def test_on_a_cpu_it_says_what_is_missing(manifest):
    choice = best_engine(manifest(*ALL), CPU)
    assert (choice.flavour, choice.precision) == ("onnxruntime", "fp32")
    assert "fastest pair" in choice.why
    assert len(choice.passed_over) == 5
    assert any("tensorrt bf16 for SM 90: there is no GPU here" in line for line in choice.passed_over)
    assert any("ONNX Runtime has no CUDAExecutionProvider" in line for line in choice.passed_over)


@pytest.mark.parametrize(
    ("pair", "machine", "said"),
    [
        (entries("tensorrt", "bf16", 90), GPU, "this GPU is SM 89"),
        (entries("tensorrt", "bf16", 89), dataclasses.replace(GPU, versions={}), "not installed"),
        (entries("tensorrt", "bf16", 89, version="11.0"), GPU, "built with 11.0, here is 11.4.0.106"),
        (entries("tensorrt", "bf16", 89, halves=("user_encoder",)), GPU, "no engine of target_scorer"),
    ],
)
def test_what_stands_in_the_way(manifest, pair, machine, said):
    choice = best_engine(manifest(pair), machine)
    assert choice.entries == {}
    assert "bundle's own graphs" in choice.why
    assert len(choice.passed_over) == 1
    assert said in choice.passed_over[0]


def test_native_code_runs_only_where_its_maker_is_trusted(manifest):
    plain = entries("tensorrt", "fp16", 89)
    coded = [dataclasses.replace(e, lowering="plugin") for e in entries("tensorrt", "bf16", 89)]
    both = manifest(coded, plain)
    choice = best_engine(both, GPU)
    assert choice.precision == "fp16"
    reason = "it carries native code, which opening it runs; say native_code if you trust its maker"
    assert choice.passed_over == (f"tensorrt bf16 for SM 89: {reason}",)
    assert best_engine(both, GPU, native_code=True).precision == "bf16"
    half = manifest([coded[0], entries("tensorrt", "bf16", 89)[1]])
    with pytest.raises(BuildError, match=r"no tensorrt engines that run here: .*carries native code"):
        best_engine(half, GPU, only="tensorrt")


@pytest.mark.parametrize(
    ("options", "asked"), [({}, False), ({"native_code": True}, True), ({"trusted": "key.pem"}, True)]
)
def test_a_session_asks_for_consent_or_a_signature(bundle_dir, monkeypatch, options, asked):
    told = []

    def choose(found, **given):
        told.append(given["native_code"])
        return model.own_graphs()

    monkeypatch.setattr(model, "best_engine", choose)
    monkeypatch.setattr("stca.bundle.check_signature", lambda *_: None)
    Session.load(bundle_dir, threads=1, **options)
    assert told == [asked]


def test_a_bundle_without_engines(manifest):
    choice = best_engine(manifest(), GPU)
    assert (choice.flavour, choice.precision, choice.entries, choice.passed_over) == ("onnxruntime", "fp32", {}, ())


def test_this_machine():
    here = Machine.here()
    assert "CPUExecutionProvider" in here.providers
    assert here.sm is None or here.sm >= 50


def test_engines_are_opened(bundle_dir, tmp_path, rng):
    from stca import probe

    root = shutil.copytree(bundle_dir, tmp_path / "B")
    build(root, engine="onnxruntime", precision="fp16")
    bundle = Bundle.load(root)
    typed = {e.graph: e for e in bundle.manifest.engines}
    specs = bundle.manifest.graphs["request"].inputs
    feeds = probe.pack(specs, [probe.single(specs, 5, 3, rng)])
    scores = []
    for choice in (
        best_engine(dataclasses.replace(bundle.manifest, engines=()), CPU),
        Choice("onnxruntime", "fp16", typed, ""),
    ):
        engines = open_engines(bundle, choice, threads=1)
        state = engines["user_encoder"].run(
            {s.name: feeds[s.name] for s in bundle.manifest.graphs["user_encoder"].inputs}
        )
        given = {**feeds, **state}
        names = [s.name for s in bundle.manifest.graphs["target_scorer"].inputs]
        scores.append(engines["target_scorer"].run({n: given[n] for n in names})["scores"])
    assert 0 < np.abs(scores[0] - scores[1]).max() < 5e-3


def test_a_gpu_engine_without_a_gpu(bundle_dir):
    bundle = Bundle.load(bundle_dir)
    pair = {e.graph: e for e in entries("tensorrt-rtx", "bf16", 12)}
    with one_line(BuildError):
        open_engines(bundle, Choice("tensorrt-rtx", "bf16", pair, ""))


def test_one_precision_of_a_flavour(manifest):
    pairs = [entries("tensorrt-rtx", p, 89) for p in ("bf16", "fp16")]
    assert best_engine(manifest(*pairs), GPU, only="tensorrt-rtx").precision == "bf16"
    assert best_engine(manifest(*pairs), GPU, only="tensorrt-rtx", precision="fp16").precision == "fp16"
    with one_line(BuildError, "no tensorrt-rtx fp32", "--engine tensorrt-rtx --precision fp32"):
        best_engine(manifest(*pairs), GPU, only="tensorrt-rtx", precision="fp32")


def test_a_session_on_an_engine_of_ones_choosing(bundle_dir, tmp_path):
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    build(root, engine="onnxruntime", precision="fp16")
    assert Session.load(root).engines["precision"] == "fp32"  # on a CPU the bundle's own graphs are faster
    assert Session.load(root, engine="onnxruntime").engines["precision"] == "fp16"
    assert Session.load(root, engine="onnxruntime", precision="fp16").engines["precision"] == "fp16"
    for asked, words in (
        ({"engine": "onnxruntime", "precision": "fp32"}, ("no onnxruntime fp32", "stca build")),
        ({"engine": "bogus"}, ("'bogus'", "onnxruntime", "tensorrt-rtx")),
    ):
        with one_line(BuildError, *words):
            Session.load(root, **asked)
