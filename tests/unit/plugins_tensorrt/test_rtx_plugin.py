"""The C++ plugin in a real parser and a real builder: TensorRT-RTX's, which need no GPU. Nothing is run.

No test names a tactic: the plugin offers none, and the builder's log leaves `TacticName` empty for its layer.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny

from stca import tensorrt_flavours
from stca.bundle import Bundle
from stca.engines.build import Workload, build
from stca.plugins import aot, plugin_library
from stca.plugins.tiling import Shape

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_libs") is None and not os.environ.get("CI"),
    reason="TensorRT-RTX is not installed: pip install 'stca[tensorrt-rtx]'",
)
LOW_BIAS = ("low bias", "segment_bias must be FLOAT")
DTYPES, SMS = ("bfloat16", "float16", "float32"), (80, 89, 120)


def export(folder: Path) -> Path:
    """Two heads of 16."""
    from stca.export.pipeline import export_checkpoint
    from stca.export.reference.checkpoint import load_checkpoint, save_checkpoint

    save_checkpoint(folder / "model.safetensors", tiny.module(tiny.config(width=32, heads=2, layers=1)))
    model = load_checkpoint(folder / "model.safetensors")
    export_checkpoint(model, folder / "B", prove=tiny.no_proof, form="projected")
    return folder / "B"


def test_a_ragged_engine_is_built_with_the_plugin_inside(tmp_path: Path) -> None:
    bundle, ragged = export(tmp_path), Workload(targets_max=64, requests_max=4)
    build(bundle, engine="tensorrt-rtx", sm=89, precision="bf16", workload=ragged)
    encoder, scorer = Bundle.load(bundle).manifest.engines
    assert (encoder.lowering, scorer.lowering) == (None, "plugin")  # what batches get by default
    assert (scorer.requests, scorer.profiles[0]["B"]) == (4, (1, 4, 4))
    assert scorer.layers["PLUGIN_V3"] == 1
    assert next(layer["Name"] for layer in scorer.fused_layers if layer["LayerType"] == "custom_layer").startswith(
        "node_target_history_attention"
    )
    plan = (bundle / scorer.file).read_bytes()
    assert b".target sm_89\n" in plan  # the library and its kernels are in the plan
    assert b".target sm_80\n" not in plan
    assert b".target sm_" not in (bundle / encoder.file).read_bytes()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every precision, for SM 80, 89 and 120, with placeholders for kernels: the builder never looks at those."""
    patch = pytest.MonkeyPatch()
    try:
        empty = aot.Artifact("attend_kernel", "// no kernel\n", "sm_80", 128, 1024, ())
        patch.setattr(aot, "compile_attend", lambda *_: empty)
        patch.setattr(aot, "compile_combine", lambda *_: empty.__class__(**{**vars(empty), "kernel": "combine_kernel"}))
        patch.setattr(aot, "assemble", lambda _: aot.Resources(32, 0, 0, 0))
        shapes = [(Shape(2, 1, 64, 64, dtype, tied=True), 0.125) for dtype in DTYPES[:2]]
        shapes += [(Shape(2, 1, 32, 32, dtype, tied=True), 0.125) for dtype in DTYPES]
        shapes.append((Shape(2, 1, 64, 64, "bfloat16", segments=True), 0.125))
        return plugin_library.build(shapes, SMS, tmp_path_factory.mktemp("library"))
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def told(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What came of each case, all in one process, which may abort."""
    folder = tmp_path_factory.mktemp("cases")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rtx_nodes.py")), str(library)],
        capture_output=True,
        text=True,
        check=False,
        env=tensorrt_flavours._environment(folder),
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": {"text": done.stderr}}


@pytest.mark.parametrize(("dtype", "sm", "tied"), list(itertools.product(DTYPES, SMS, (False, True))))
def test_each_precision_and_sm_tied_or_not_is_one_layer_of_the_engine(
    told: dict[str, dict[str, object]], dtype: str, sm: int, tied: bool
) -> None:
    case = told[f"{dtype} {sm} {'tied' if tied else 'apart'}"]
    assert case["network"] == ["PLUGIN_V3"]
    assert case["engine"] == ["custom_layer"]
    assert case["holds_library"]


@pytest.mark.parametrize("sm", SMS)
def test_a_node_over_lists_of_segments_is_one_layer_too(told: dict[str, dict[str, object]], sm: int) -> None:
    case = told[f"lists {sm}"]
    assert (case["network"], case["engine"], case["holds_library"]) == (["PLUGIN_V3"], ["custom_layer"], True)


def test_a_library_without_such_a_kernel_is_no_engine(told: dict[str, dict[str, object]]) -> None:
    assert told["float32 of 64"]["engine"] is None
    assert "no kernel for H=2 H_k=1 D=64" in str(told["stderr"]["text"])


def test_wrong_types_are_refused_when_the_graph_is_parsed(told: dict[str, dict[str, object]]) -> None:
    for case, said in (("int64 offsets", "target_offsets must be INT32"), ("mixed", "must have one type"), LOW_BIAS):
        assert told[case]["network"] is None
        assert said in str(told["stderr"]["text"])
