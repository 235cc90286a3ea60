"""Engines from a bundle: built for real by TensorRT-RTX on this CPU where it is installed, and refused in one line."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from support import tiny
from support.errors import one_line

import stca.engines.build
import stca.engines.tensorrt_backend
import stca.folders
from stca import probe
from stca.bundle import Bundle, BundleChangedError, seal, sha256_of
from stca.engines.build import Workload, build
from stca.engines.cache import EngineCache
from stca.errors import BuildError, BundleError
from stca.manifest import WEIGHTS, Manifest
from stca.runtime import OnnxRuntimeEngine
from stca.specs import HALVES
from stca.tensorrt_flavours import FLAVOURS, installed_version

RTX = "tensorrt-rtx"
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason=f"TensorRT-RTX is not installed: {FLAVOURS[RTX].install}",
)
WORKLOAD = Workload(targets_max=64)


@pytest.fixture
def bundle(bundle_dir, tmp_path):
    """The absorbed model: one key head of 24, for which there is a fused kernel."""
    return shutil.copytree(bundle_dir, tmp_path / "B")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


@pytest.fixture(scope="module")
def built(bundle_dir, tmp_path_factory):
    """A bundle with bfloat16 engines for SM 89, what `build` said of them, and the cache. Not to be written to."""
    root = tmp_path_factory.mktemp("built")
    bundle = shutil.copytree(bundle_dir, root / "B")
    cache = EngineCache(root / "cache")
    return bundle, build(bundle, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD, cache=cache), cache


@needs_rtx
def test_both_halves_are_built_and_written_into_the_bundle(built, bundle_dir):
    root, results, _ = built
    assert [r["graph"] for r in results] == list(HALVES)
    bundle, before = Bundle.load(root), Bundle.load(bundle_dir)
    assert {n: f for n, f in bundle.manifest.files.items() if n in before.manifest.files} == before.manifest.files
    for result, entry in zip(results, bundle.manifest.engines, strict=True):
        plan = root / entry.file
        assert result["path"] == str(plan)
        assert result["bytes"] == entry.bytes == plan.stat().st_size > 100_000
        assert result["seconds"] > 0
        assert (entry.flavour, entry.sm, entry.precision) == (RTX, 89, "bf16")
        assert entry.version == installed_version(FLAVOURS[RTX])
        assert entry.requests == 1
        assert result["cache"] == "miss"
        assert json.dumps(result)
    encoder, scorer = bundle.manifest.engines
    assert encoder.lowering is None
    assert scorer.lowering == "fused"
    assert scorer.layers["ATTENTION_INPUT"] == 2
    assert sum("mha" in layer["Name"] for layer in scorer.fused_layers) == 2  # by the builder's log
    assert scorer.memory["activations"] > 0
    assert scorer.profiles == ({"N_h": (1, 32, 32), "N_t": (1, 64, 64)},)
    shapes = {i["name"]: (i["dtype"], i["shape"]) for i in scorer.inputs}
    assert shapes["attention_0_history"] == ("bfloat16", ("N_h", 1, 24))
    assert shapes["state_history_offsets"] == ("int32", (2,))
    assert "target_offsets" not in shapes  # one request: all targets are its own
    assert (encoder.padded, scorer.padded) == (("N_h",), ("N_t",))  # one attention looks at all tokens it is given
    assert scorer.outputs == ({"name": "scores", "dtype": "float32", "shape": ("N_t", 2)},)


@needs_rtx
def test_a_second_build_touches_nothing(built, monkeypatch):
    root, results, _ = built
    before = tiny.contents(root)
    for module, name in ((stca.engines.tensorrt_backend, "build_plan"), (stca.engines.build, "_write")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was built again"))
    monkeypatch.setattr(Bundle, "load", lambda *_: pytest.fail("a hit must not read all weights"))
    again = build(root, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD)
    assert [(r["cache"], r["why"]) for r in again] == [("hit", "it is in the bundle")] * 2
    assert [r["seconds"] for r in again] == [r["seconds"] for r in results]
    assert tiny.contents(root) == before


@needs_rtx
def test_a_fresh_export_of_the_same_weights_is_served_from_the_cache(built, bundle, monkeypatch):
    root, _, cache = built
    monkeypatch.setattr(stca.engines.tensorrt_backend, "build_plan", lambda *_: pytest.fail("was built again"))
    results = build(bundle, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD, cache=cache)
    assert [r["cache"] for r in results] == ["hit", "hit"]
    assert tiny.contents(bundle) == tiny.contents(root)
    again = build(bundle, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD, cache=cache)
    assert [r["why"] for r in again] == ["it is in the bundle"] * 2


@needs_rtx
def test_an_engine_from_the_cache_takes_the_place_of_another(built, tmp_path):
    """Other sizes under the same name, then the first ones again: the plan must be that of its entry."""
    root, _, cache = built
    bundle = shutil.copytree(root, tmp_path / "B")
    asked = {"engine": RTX, "sm": 89, "precision": "bf16", "cache": cache}
    build(bundle, **asked, workload=Workload(targets_max=8))
    assert tiny.contents(bundle) != tiny.contents(root)
    assert [r["cache"] for r in build(bundle, **asked, workload=WORKLOAD)] == ["hit", "hit"]
    plans, before = ({n: x for n, x in tiny.contents(b).items() if n.endswith(".plan")} for b in (bundle, root))
    assert plans == before


@needs_rtx
def test_a_cache_that_cannot_be_written_to_loses_no_engine(bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = []
    cache = EngineCache(tmp_path / "file")
    results = build(bundle, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD, cache=cache, progress=told.append)
    assert all(Path(r["path"]).exists() for r in results)
    assert any("cache is not used" in line and "is no directory; remove it" in line for line in told)


def manifest_of(root):
    """Without looking at the files."""
    return Manifest.from_json((root / "manifest.json").read_text())


def dry(root, cache, **changes):
    asked = {"engine": RTX, "sm": 89, "precision": "bf16", "workload": WORKLOAD, **changes}
    return build(root, dry_run=True, cache=cache, **asked)


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp16"}, "precision changed from bf16 to fp16"),
        ({"sm": 86}, "SM changed from 89 to 86"),
        ({"lowering": "decomposed"}, "lowering changed from fused to decomposed"),
        ({"workload": Workload(history_max=16, targets_max=64)}, "profiles changed"),
        ({"workload": Workload(history_buckets=(8,), targets_max=64)}, "profiles changed"),
        ({"refit": "weights"}, "refit changed from none to weights"),
    ],
)
def test_a_miss_says_why(built, changes, said):
    root, _, cache = built
    before = tiny.contents(root)
    results = dry(root, cache, **changes)
    assert all(r["cache"] == "miss" and r["why"].startswith(said) for r in results), results
    assert tiny.contents(root) == before


@needs_rtx
def test_one_other_weight_is_a_miss_that_says_so(built, bundle):
    _, _, cache = built
    weights = bytearray((bundle / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(weights)
    seal(bundle, dataclasses.replace(manifest_of(bundle), weights=sha256_of(bundle / WEIGHTS)))
    assert all(r["why"].startswith("the weights changed") and ";" not in r["why"] for r in dry(bundle, cache))


@needs_rtx
def test_a_damaged_engine_is_built_again(built, tmp_path):
    root = shutil.copytree(built[0], tmp_path / "B")
    plan = root / Bundle.load(root).manifest.engines[0].file
    plan.write_bytes(plan.read_bytes()[:-1])
    found = dry(root, None)
    assert [r["cache"] for r in found] == ["miss", "hit"]
    with one_line(BundleError, plan.name):  # and the bundle as a whole is not believed
        build(root, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD)


@needs_rtx
def test_nothing_in_the_working_directory_is_imported(bundle, tmp_path, monkeypatch):
    """Which may be a bundle's, and nothing in a bundle is executed."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("onnx", "numpy", "tensorrt_rtx_bindings"):
        (here / f"{name}.py").write_text("raise SystemExit('was imported')")
    monkeypatch.chdir(here)
    assert len(build(bundle, engine=RTX, sm=89, precision="bf16", workload=WORKLOAD)) == 2


@needs_rtx
def test_a_dry_run_foretells_memory(bundle):
    few, many = (dry(bundle, None, workload=Workload(targets_max=n))[1]["memory"] for n in (16, 64))
    assert few["weights"] == many["weights"] > 0
    assert few["inputs_and_outputs"] < many["inputs_and_outputs"]
    assert few["activations"] < many["activations"]
    assert not Bundle.load(bundle).manifest.engines


@needs_rtx
@pytest.mark.parametrize(("precision", "attention"), [("fp32", None), ("fp16", "fused")])
def test_each_precision_builds(bundle, precision, attention):
    results = build(bundle, engine=RTX, sm=80, precision=precision, lowering=attention, workload=WORKLOAD)
    assert results[1]["lowering"] == ("fused" if attention == "fused" else "decomposed")
    assert Bundle.load(bundle).manifest.engines[1].layers.get("ATTENTION_INPUT", 0) == (
        2 if attention == "fused" else 0
    )


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_with_time_deltas_builds(exported, tmp_path, precision):
    """Its scorer looks up each token's request time."""
    bundle = shutil.copytree(exported("delta", "absorbed"), tmp_path / "B")
    results = build(bundle, engine=RTX, sm=89, precision=precision, workload=WORKLOAD)
    assert results[1]["lowering"] == ("decomposed" if precision == "fp32" else "fused")


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_quantized_graphs_build(quantized, precision):
    """Every Q/DQ pair of the graph is in the network, beside the fused attention."""
    results = build(quantized, engine=RTX, sm=89, precision=precision, workload=WORKLOAD)
    assert results[1]["lowering"] == ("decomposed" if precision == "fp32" else "fused")
    for entry in Bundle.load(quantized).manifest.engines:
        graph = onnx.load(quantized / f"{entry.graph}.onnx", load_external_data=False).graph
        wanted = collections.Counter(n.op_type for n in graph.node)
        assert entry.layers["QUANTIZE"] == wanted["QuantizeLinear"] > 5
        assert entry.layers["DEQUANTIZE"] == wanted["DequantizeLinear"] > 10


@pytest.fixture
def quantized(bundle, tmp_path):
    """The bundle with INT8 matrix products, as a calibration with ONNX Runtime's own tool makes them."""
    loaded = Bundle.load(bundle)
    specs = loaded.manifest.graphs["request"].inputs
    values = probe.pack(specs, [probe.single(specs, 20, 9, np.random.default_rng(0))])
    for half in HALVES:
        engine = OnnxRuntimeEngine(loaded.file(half), threads=1)
        feeds = {name: values[name] for name in engine.inputs}
        values |= engine.run(feeds)
        onnx.save(onnx.load(loaded.file(half)), tmp_path / "whole.onnx")
        quantize_static(
            tmp_path / "whole.onnx",
            tmp_path / "int8.onnx",
            SimpleNamespace(get_next=iter([feeds, None]).__next__),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        loaded.file(half).unlink()
        shutil.copy(tmp_path / "int8.onnx", loaded.file(half))
    seal(bundle, loaded.manifest)
    return bundle


@needs_rtx
def test_an_engine_without_its_fused_attention_is_not_built(exported, tmp_path):
    """Float32 has no fused kernel. The encoder's engine was built by then, and nothing of it is left."""
    bundle = shutil.copytree(exported("log", "projected"), tmp_path / "B")
    before = tiny.contents(tmp_path)
    with one_line(BuildError, "target_scorer.onnx", "no fused attention", "fp32", "--lowering decomposed"):
        build(bundle, engine=RTX, sm=89, precision="fp32", lowering="fused", workload=WORKLOAD)
    assert tiny.contents(tmp_path) == before


@needs_rtx
def test_an_sm_it_does_not_know(bundle):
    with one_line(BuildError, "SM 90", "89", "--sm"):
        build(bundle, engine=RTX, sm=90, workload=WORKLOAD)
    with one_line(BuildError, "not given", "--sm"):
        build(bundle, engine=RTX, workload=WORKLOAD)


@needs_rtx
def test_a_weight_outside_the_bundle_is_refused_before_any_parser(bundle, tmp_path, fake_rtx):
    """A resealed bundle whose scorer points elsewhere; the parser here would abort if it were reached."""
    fake_rtx("class Builder:\n    def __init__(self, log): raise SystemExit('was reached')\n")
    model = onnx.load(bundle / "target_scorer.onnx", load_external_data=False)
    next(t for t in model.graph.initializer if t.external_data).external_data[0].value = "../secret"
    onnx.save(model, bundle / "target_scorer.onnx")
    seal(bundle, manifest_of(bundle))
    with one_line(BuildError, "../secret"):
        build(bundle, engine=RTX, sm=89, workload=WORKLOAD)


@pytest.fixture
def fake_rtx(tmp_path, monkeypatch):
    """Put a module in TensorRT-RTX's place, for this process and those it starts."""

    def put(source):
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "tensorrt_rtx_bindings.py").write_text(
            "__version__ = '0'\nclass ComputeCapability: __members__ = {'SM89': 1}\nclass ILogger: pass\n" + source
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        monkeypatch.syspath_prepend(str(tmp_path / "fake"))

    return put


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import os, sys\nprint('assertion x > 0 failed', flush=True)\nos.abort()",
            ("signal 6", "assertion x > 0 failed"),
        ),
        ("import os\nos._exit(3)", ("exit code 3", "nothing")),
        ("import no_such_library", ("cannot be loaded", "no_such_library", "pip install")),
        (
            "class Builder:\n    def __init__(self, log): raise TypeError('factory function returned nullptr')",
            ("no builder",),
        ),
    ],
)
def test_a_library_that_dies_is_an_error(bundle, fake_rtx, source, words):
    fake_rtx(source)
    before = tiny.contents(bundle)
    with one_line(BuildError, RTX, *words):
        build(bundle, engine=RTX, sm=89, workload=WORKLOAD)
    assert tiny.contents(bundle) == before


def test_not_installed(bundle, monkeypatch):
    monkeypatch.setitem(FLAVOURS, RTX, dataclasses.replace(FLAVOURS[RTX], modules=("no_such_module",)))
    with one_line(BuildError, RTX, "not installed", "pip install"):
        build(bundle, engine=RTX, sm=89)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"engine": "tensorflow"}, ("'tensorflow'", "onnxruntime")),
        ({"engine": "onnxruntime", "lowering": "fused"}, ("onnxruntime", "'fused'")),
        ({"engine": "onnxruntime", "precision": "bf16"}, ("no bf16 kernels", "fp32")),
        ({"engine": "onnxruntime", "provider": "CUDAExecutionProvider"}, ("CUDAExecutionProvider", "CPU")),
        ({"engine": "onnxruntime", "provider": "../x", "dry_run": True}, ("../x", "CPUExecutionProvider")),
        ({"engine": RTX, "sm": 89, "lowering": "quick"}, (RTX, "'quick'", "fused")),
        (
            {"engine": RTX, "sm": 89, "lowering": "fused", "workload": Workload(requests_max=2)},
            ("one request", "plugin"),
        ),
        ({"engine": RTX, "sm": 89, "provider": "CUDAExecutionProvider"}, ("CUDAExecutionProvider", RTX)),
        ({"engine": "onnxruntime", "sm": 89}, ("onnxruntime", "any GPU")),
        ({"engine": "onnxruntime", "workload": WORKLOAD}, ("onnxruntime", "any size")),
        pytest.param({"engine": RTX, "sm": 89, "workload": Workload(targets_max=0)}, ("N_t", "0"), marks=needs_rtx),
        pytest.param(
            {"engine": RTX, "sm": 89, "workload": Workload(sizes={"N_x": 3})},
            ("'N_x'", "B_plus_1, N_h, N_t"),
            marks=needs_rtx,
        ),
        pytest.param(
            {"engine": RTX, "sm": 89, "workload": Workload(sizes={"N_h": 3})}, ("N_h", "--history-max"), marks=needs_rtx
        ),
        pytest.param({"engine": RTX, "sm": 89, "workload": Workload(99)}, ("32 tokens", "99"), marks=needs_rtx),
        pytest.param(
            {"engine": RTX, "sm": 89, "workload": Workload(history_buckets=(40,))}, ("bucket 40", "32"), marks=needs_rtx
        ),
        pytest.param({"engine": RTX, "sm": 75}, ("user_encoder.onnx", "SM 75", "newer GPU"), marks=needs_rtx),
        pytest.param({"engine": RTX, "sm": 999, "dry_run": True}, ("no SM 999", "89", "120"), marks=needs_rtx),
    ],
)
def test_what_cannot_be_asked(bundle, asked, words):
    before = tiny.contents(bundle)
    with one_line(BuildError, *words):
        build(bundle, **asked)
    assert tiny.contents(bundle) == before


def test_no_bundle(tmp_path):
    with one_line(BundleError, "no such bundle"):
        build(tmp_path / "nothing", engine="onnxruntime")


def test_onnxruntime_engines(bundle):
    """float32 is the bundle's own graph; float16 is a typed one, kept beside it with its weights."""
    before = set(tiny.contents(bundle))
    for precision in ("fp32", "fp16"):
        results = build(bundle, engine="onnxruntime", precision=precision)
        assert [r["cache"] for r in results] == ["miss", "miss"]
    assert [r["cache"] for r in build(bundle, engine="onnxruntime", precision="fp16")] == ["hit", "hit"]
    loaded = Bundle.load(bundle)
    own, typed = loaded.manifest.engines[:2], loaded.manifest.engines[2:]
    assert [e.file for e in own] == ["user_encoder.onnx", "target_scorer.onnx"]
    added = {name for e in typed for name in (e.file, f"{Path(e.file).stem}.weights")}
    assert set(tiny.contents(bundle)) == before | added
    assert sum(len(x) for n, x in tiny.contents(bundle).items() if n in added) < 0.9 * (bundle / WEIGHTS).stat().st_size


def test_engines_of_two_providers_stand_side_by_side(bundle, monkeypatch):
    """No CUDA here: another of ONNX Runtime's providers, which runs on the CPU, takes its name."""
    import stca.runtime.engine

    real = stca.runtime.engine.OnnxRuntimeEngine

    def on_cpu(file, *, threads, providers):
        return real(file, threads=threads)

    monkeypatch.setattr(stca.runtime.engine, "OnnxRuntimeEngine", on_cpu)
    monkeypatch.setattr(stca.runtime.engine, "require_provider", lambda _: None)
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        for precision in ("fp32", "fp16"):
            build(bundle, engine="onnxruntime", precision=precision, provider=provider)
    entries = Bundle.load(bundle).manifest.engines
    assert len(entries) == 8
    assert len({e.file for e in entries}) == 2 + 2 * 2  # the bundle's own graphs serve both
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        for precision in ("fp32", "fp16"):
            again = build(bundle, engine="onnxruntime", precision=precision, provider=provider)
            assert [r["cache"] for r in again] == ["hit", "hit"]


def test_an_engine_takes_the_place_of_one_that_served_the_same(bundle, monkeypatch):
    """With another version of the library it is another engine under the same name."""
    import onnxruntime

    build(bundle, engine="onnxruntime", precision="fp16")
    monkeypatch.setattr(onnxruntime, "__version__", "99")
    results = build(bundle, engine="onnxruntime", precision="fp16")
    assert all(r["cache"] == "miss" and r["why"].startswith("version changed") for r in results)
    assert [e.version for e in Bundle.load(bundle).manifest.engines] == ["99", "99"]


def test_two_builds_at_once_lose_nothing(bundle, monkeypatch):
    """Engines of one that ends while the other writes stay. To weights that came meanwhile, none are added."""
    real = stca.folders.share

    def meanwhile(work):
        monkeypatch.setattr(stca.folders, "share", real)
        work()

    def shared(work):
        monkeypatch.setattr(stca.folders, "share", lambda *names: (meanwhile(work), real(*names)))

    shared(lambda: build(bundle, engine="onnxruntime", precision="fp16"))
    build(bundle, engine="onnxruntime")
    assert [e.precision for e in Bundle.load(bundle).manifest.engines] == ["fp16", "fp16", "fp32", "fp32"]

    def other_weights():
        loaded = Bundle.load(bundle)
        weights = bytearray((bundle / WEIGHTS).read_bytes())
        weights[-1] ^= 1
        (bundle / WEIGHTS).write_bytes(weights)
        seal(bundle, dataclasses.replace(loaded.manifest, weights=sha256_of(bundle / WEIGHTS), engines=()))

    seal(bundle, dataclasses.replace(Bundle.load(bundle).manifest, engines=()))
    shared(other_weights)
    with one_line(BundleChangedError, "another process"):
        build(bundle, engine="onnxruntime")


def test_weights_never_have_two_names(bundle):
    """ONNX refuses external data with a second name, which a killed build would leave behind."""
    build(bundle, engine="onnxruntime")
    inode = (bundle / "request.onnx").stat().st_ino
    assert (bundle / WEIGHTS).stat().st_nlink == 1
    build(bundle, engine="onnxruntime", precision="fp16")
    assert (bundle / "request.onnx").stat().st_ino == inode  # the graphs are shared, not copied


def test_killed_midway_the_bundle_is_as_it_was(bundle, tmp_path):
    before = tiny.contents(bundle)
    code = (
        "import os, signal, sys, stca.engines.build, stca.bundle\n"
        "stca.bundle.folders.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "stca.engines.build.build(sys.argv[1], engine='onnxruntime', precision='fp16')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert tiny.contents(bundle) == before
    onnx.load(Bundle.load(bundle).file("request"))


def test_profiles():
    dims = ("N_h", "N_t", "B", "B_plus_1", "pages")
    workload = Workload(1000, 300, 4, (100,), {"pages": 7})
    first, second = workload.profiles(dims, 10_240)
    assert first == {
        "N_h": (1, 100, 100),
        "N_t": (1, 300, 300),
        "B": (1, 4, 4),
        "B_plus_1": (2, 5, 5),
        "pages": (1, 7, 7),
    }
    assert second["N_h"] == (101, 1000, 1000)
    assert Workload().profiles(("N_h",), None) == [{"N_h": (1, 10_240, 10_240)}]
    assert Workload().profiles(("N_h",), 32) == [{"N_h": (1, 32, 32)}]
    with one_line(BuildError, "'pages'", "--size pages=N"):
        Workload().profiles(dims, None)


def test_a_lowering_that_changes_scores_is_refused(bundle, monkeypatch):
    """The guard runs before any engine is made; here the lowered softmax is made wrong."""
    from stca.export.passes import lower

    monkeypatch.setattr(
        lower, "_DECOMPOSED", lower._DECOMPOSED.replace("<axis: int = -1> ({logits})", "<axis: int = -2> ({logits})")
    )
    monkeypatch.setattr(stca.engines.tensorrt_backend, "build_plan", lambda *_: pytest.fail("was built"))
    monkeypatch.setattr(stca.engines.tensorrt_backend, "installed_version", lambda _: "1")
    with one_line(BuildError, "scores", "history tokens", "ONNX Runtime"):
        build(bundle, engine=RTX, sm=89, workload=WORKLOAD)
