"""The command line as a user meets it: JSON on stdout, one line per error, exit codes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from stca import commands as cli
from stca.export.reference.checkpoint import save_checkpoint
from stca.export.reference.config import Field, StcaConfig
from stca.export.reference.module import Stca
from stca.runtime import Request, Session

CONFIG = StcaConfig(
    items=50,
    tasks=("finish", "like"),
    item_width=8,
    field_width=4,
    history_fields=(Field("action", 3),),
    user_fields=(Field("segment", 4),),
    request_fields=(Field("device", 3),),
    width=16,
    heads=2,
    layers=2,
    ffn_expansion=2,
    mixer_head_width=4,
    mixer_layers=1,
    max_history=256,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(folder / "model.safetensors", Stca(CONFIG))
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def exported(folder: Path, checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """A bundle made by the command line in a process of its own, and what the command printed."""
    bundle = folder / "bundle"
    command = [sys.executable, "-m", "stca", "export", str(checkpoint), "--out", str(bundle), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "splitting by dataflow" in done.stderr  # progress goes to stderr
    return bundle, json.loads(done.stdout)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as e:
        code = int(e.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line a refused command prints; it must exit with 2 and print nothing on stdout."""
    code, out, err = run(capsys, *argv)
    assert code == 2, err
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("[")]  # progress lines start with a time
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_export_says_what_it_made(exported: tuple[Path, dict[str, Any]]) -> None:
    bundle, said = exported
    assert said["bundle"] == str(bundle)
    assert len(said["weights"]) == 64
    assert said["parity"]["passed"] is True
    assert said["state"]["bytes_per_token"] == 2 * CONFIG.layers * CONFIG.width * 4  # K and V of every layer, float32


def test_verify_reports_every_stage(exported: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "verify", exported[0], "--json")
    assert code == 0
    report = json.loads(out)
    assert report["passed"] is True
    assert [s["name"] for s in report["stages"]] == ["torch", "request_graph", "joined_halves", "session"]
    for stage in report["stages"]:
        assert {"name", "against", "max_abs", "max_rel", "cosine", "topk_overlap"} <= stage.keys()
        assert stage["topk_overlap"] == 1.0


def test_bench_reports_every_stage_and_size(
    exported: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys, "bench", exported[0], "--history", "8,200", "--targets", "1,5", "--seconds", "0.01", "--json"
    )
    assert code == 0
    report = json.loads(out)
    sizes = {(r["history"], r["targets"]) for r in report["rows"]}
    assert sizes == {(8, 1), (8, 5), (200, 1), (200, 5)}
    stages = {r["stage"] for r in report["rows"]}
    assert stages == {"user_encoder", "target_scorer", "hit", "miss", "pointwise"}
    assert all(r["runs"] >= 5 and 0 < r["p50_ms"] <= r["p95_ms"] <= r["p99_ms"] for r in report["rows"])
    assert len(report["ratios"]) == 4


def test_bench_measures_the_engines_that_were_built_and_says_why_others_do_not_run(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "B")
    words = ("bench", folder, "--history", "8", "--targets", "2", "--seconds", "0.01")
    assert "run `stca build --engine onnxruntime`" in refused(capsys, *words, "--engine", "onnxruntime")
    assert run(capsys, "build", folder, "--engine", "onnxruntime", "--no-cache")[0] == 0
    asked = [w for e in ("onnxruntime", "graphs", "tensorrt") for w in ("--engine", e)]
    code, out, _ = run(capsys, *words, *asked, "--json")
    assert code == 0
    report = json.loads(out)
    assert {(r["engine"], r["stage"]) for r in report["rows"]} == {
        ("graphs", "pointwise"),
        *itertools.product(("graphs", "onnxruntime"), ("user_encoder", "target_scorer", "miss", "hit")),
    }
    assert [(r["engine"], r["pointwise_over_miss"] is None) for r in report["ratios"]] == [
        ("onnxruntime", True),
        ("graphs", False),
    ]
    assert report["measured"].keys() == {"onnxruntime", "graphs"}
    assert report["absent"].keys() == {"tensorrt"}
    code, out, _ = run(capsys, *words, *asked)
    assert "tensorrt: not measured, no tensorrt engines that run here" in out
    assert "graphs" in refused(capsys, *words, "--engine", "onnxruntime", "--provider", "CPUExecutionProvider")
    assert "NoSuch" in refused(capsys, *words, "--provider", "NoSuch")


def test_inspect_names_scopes_and_state(
    exported: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "inspect", exported[0])
    assert code == 0
    assert "history_item" in out
    assert "attention_0_key" in out
    assert "can be appended" in out


def test_split_serves_any_onnx_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A two-tower model that knows nothing of this toolkit: user tower cached, dot product per target."""
    rng = np.random.default_rng(0)
    h = onnx.helper
    weight = onnx.numpy_helper.from_array(rng.standard_normal((8, 4)).astype("f"), "w_user")
    table = onnx.numpy_helper.from_array(rng.standard_normal((20, 4)).astype("f"), "items")
    graph = h.make_graph(
        [
            h.make_node("MatMul", ["profile", "w_user"], ["hidden"]),
            h.make_node("Tanh", ["hidden"], ["user"]),
            h.make_node("Gather", ["items", "item"], ["target"]),
            h.make_node("Transpose", ["user"], ["user_t"], perm=[1, 0]),
            h.make_node("MatMul", ["target", "user_t"], ["dot"]),
            h.make_node("Add", ["dot", "bias"], ["score"]),
        ],
        "two_towers",
        [
            h.make_tensor_value_info("profile", onnx.TensorProto.FLOAT, [1, 8]),
            h.make_tensor_value_info("bias", onnx.TensorProto.FLOAT, [1, 1]),
            h.make_tensor_value_info("item", onnx.TensorProto.INT64, ["candidates"]),
        ],
        [h.make_tensor_value_info("score", onnx.TensorProto.FLOAT, ["candidates", 1])],
        [weight, table],
    )
    file = folder / "towers.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=10), file)
    scopes = ["--user-inputs", "profile", "--request-inputs", "bias", "--target-inputs", "item"]
    code, out, err = run(
        capsys, "split", file, *scopes, "--out", folder / "towers", "--json", "--size", "candidates=300"
    )
    assert code == 0, err
    assert json.loads(out)["state"]["bytes"] == 16
    session = Session.load(folder / "towers")
    profile, bias = rng.standard_normal((1, 8)).astype("f"), np.full((1, 1), 0.5, "f")
    score = session.score(Request({"profile": profile, "bias": bias, "item": [3, 7]}, user="u"))
    user = np.tanh(profile @ onnx.numpy_helper.to_array(weight))
    np.testing.assert_allclose(score, onnx.numpy_helper.to_array(table)[[3, 7]] @ user.T + 0.5, rtol=1e-5)

    assert "'bias' has no scope" in refused(
        capsys, "split", file, "--user-inputs", "profile", "--target-inputs", "item", "--out", folder / "x"
    )
    assert "no input 'typo'" in refused(capsys, "split", file, *scopes, "--user-inputs", "typo", "--out", folder / "x")
    assert "profile" in refused(
        capsys, "split", file, *scopes, "--target-inputs", "item,profile", "--out", folder / "x"
    )
    assert not (folder / "x").exists()


def test_a_failed_check_exits_with_1(
    exported: tuple[Path, dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle whose scorer was made to compute something else, honestly resealed: verify must fail, not error."""
    import shutil

    from stca.bundle import Bundle, seal

    wrong = folder / "wrong"
    shutil.copytree(exported[0], wrong)
    file = wrong / "target_scorer.onnx"
    model = onnx.load(file, load_external_data=False)
    attention = next(n for n in model.graph.node if n.op_type == "TargetHistoryAttention")
    next(a for a in attention.attribute if a.name == "scale").f *= 1.001
    onnx.save(model, file)
    seal(wrong, Bundle.load(exported[0]).manifest)
    code, out, _ = run(capsys, "verify", wrong, "--json")
    assert code == 1
    failed = {s["name"] for s in json.loads(out)["stages"] if not s["passed"]}
    assert failed == {"joined_halves", "session"}


@pytest.mark.parametrize(
    "words", [("inspect",), ("inspect", "x", "--z\nz"), ("nothing",), ("bench", "x", "--history", "0")], ids=str
)
def test_bad_usage_is_json_where_it_was_asked_for(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--json"])
    told = capsys.readouterr()
    assert end.value.code == 2
    assert json.loads(told.out)["error"] == told.err.rstrip("\n")
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("split", "/dev/zero", "--user-inputs", "a", "--target-inputs", "b", "--out", "o"),
        ("export", "/dev/zero", "--out", "o"),
    ],
    ids=lambda words: words[0],
)
def test_what_has_no_end_is_not_read(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert "is no plain file" in refused(capsys, *words)


def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], folder: Path, checkpoint: Path) -> None:
    assert "--out" in refused(capsys, "export", checkpoint)
    assert "a CHECKPOINT or --model" in refused(capsys, "export", "--out", folder / "x")
    assert "invalid choice" in refused(capsys, "frobnicate")
    assert "from 1" in refused(capsys, "bench", folder, "--history", "0")
    assert "no such checkpoint" in refused(capsys, "export", folder / "nowhere.safetensors", "--out", folder / "x")
    assert "no such bundle" in refused(capsys, "verify", folder / "nowhere")
    assert "no module 'no'" in refused(capsys, "export", "--model", "no.such:thing", "--out", folder / "x")
    assert "PACKAGE.MODULE:CALLABLE" in refused(capsys, "export", "--model", "json:thing", "--out", folder / "x")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("precious")
    assert "is not a bundle" in refused(capsys, "export", checkpoint, "--out", folder / "occupied")
    assert (folder / "occupied" / "thesis.txt").read_text() == "precious"
    (folder / "junk.onnx").write_bytes(os.urandom(100))
    assert "not an ONNX model" in refused(
        capsys, "split", folder / "junk.onnx", "--user-inputs", "a", "--out", folder / "x"
    )


def test_a_callable_can_be_exported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own module, called with a dict of named tensors."""
    (folder / "their_model.py").write_text(
        "import torch\n"
        "from stca.export import RequestModel, TensorSpec\n"
        "class Towers(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.w = torch.nn.Parameter(torch.randn(6, 6))\n"
        "    def forward(self, x):\n"
        "        return torch.sigmoid(x['item'] @ torch.tanh(x['profile'] @ self.w).sum(0, keepdim=True).T * 0.01)\n"
        "def model():\n"
        "    return RequestModel(Towers(), (\n"
        "        TensorSpec('profile', 'float32', ('events', 6), 'user'),\n"
        "        TensorSpec('item', 'float32', ('N_t', 6), 'target'),\n"
        "    ))\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    out = folder / "theirs"
    code, text, err = run(
        capsys, "export", "--model", "their_model:model", "--out", out, "--json", "--size", "events=500"
    )
    assert code == 0, err
    assert json.loads(text)["parity"]["stages"][0]["name"] == "torch"
    code, text, _ = run(capsys, "verify", out, "--json")
    assert code == 0
    assert json.loads(text)["reference"] == "float64 onnx.reference"
