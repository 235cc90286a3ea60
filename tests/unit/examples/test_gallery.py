"""The gallery's models are what they say, and its rows tell right scores from wrong ones, refusals and deaths."""

from __future__ import annotations

import ast
import inspect
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from stca.examples import gallery
from stca.examples.gallery import __main__ as command, measure, models, onnx_files
from stca.examples.gallery.declared import GalleryModel, Input
from stca.export import pipeline
from stca.export.freeing import RULES


@pytest.mark.parametrize("name", gallery.NAMES)
def test_a_model_is_one_short_file_that_knows_only_its_declaration(name):
    source = Path(models.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    imports = [n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    assert [m for m in imports if m and m.startswith("stca")] == ["stca.examples.gallery.declared"]


@pytest.mark.parametrize("name", gallery.NAMES)
def test_a_model_takes_what_it_declares_row_by_row(name):
    """One user copied to each target scores as each target alone, and every input matters to the scores."""
    model = gallery.load(name)
    module, request = model.build(), model.request(model.history, 5)
    assert list(inspect.signature(module.forward).parameters) == list(model.inputs)
    together = scores(module, model.rows(request, 0, 5))
    alone = np.concatenate([scores(module, model.rows(request, i, 1)) for i in range(5)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape[0] == 5
    assert len(np.unique(together[:, 0])) == 5, "targets of equal scores could be swapped unseen"
    other = model.request(model.history, 5, seed=1)
    for changed in model.inputs:
        mixed = {n: (other if n == changed else request)[n] for n in request}
        assert not np.array_equal(together, scores(module, model.rows(mixed, 0, 5))), changed


def scores(module, feeds):
    with torch.no_grad():
        out = module(**{n: torch.from_numpy(x) for n, x in feeds.items()})
    outputs = out.values() if isinstance(out, dict) else [out]
    return np.concatenate([y.numpy().reshape(len(y), -1) for y in outputs], axis=1)


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_an_onnx_file_is_the_module_at_any_size(exporter, tmp_path, capfd):
    model = gallery.load("hstu")
    onnx_files.write(model, exporter, tmp_path / "m.onnx")
    assert not capfd.readouterr().out, "stdout belongs to the table"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for history, targets in ((1, 4), (40, 1)):
        feeds = model.rows(model.request(history, targets), 0, targets)
        (got,) = session.run(None, feeds)
        np.testing.assert_allclose(got[:, None], scores(model.build(), feeds), rtol=1e-4, atol=1e-5)


class Mean(nn.Module):
    """The least model of a request: the mean of a history, dotted with each target."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(400, 8)

    def forward(self, history: Tensor, targets: Tensor) -> Tensor:
        total = self.item(history).sum(0) / (history.shape[0] + 1)
        return (self.item(targets) * total).sum(-1)


@pytest.fixture
def mean(monkeypatch):
    inputs = {"history": Input("int64", ("N_h",), "user", 400), "targets": Input("int64", ("N_t",), "target", 400)}
    monkeypatch.setattr(measure, "load", lambda _: GalleryModel("mean", Mean, inputs, history=30))
    monkeypatch.setattr(measure, "SECONDS", 0.01)


def test_a_row_has_parity_and_times(mean):
    found = measure.row("mean", "dynamo", 300)
    assert found.passed, found
    assert found.refused is None
    assert found.lifted is None, "there is no batch axis to part"
    assert (found.state_bytes, found.copied_bytes) == (8 * 4, 300 * 30 * 8)
    assert min(found.pointwise_ms, found.miss_ms, found.hit_ms) > 0
    assert json.loads(json.dumps(found.as_dict()))["parity"]["passed"] is True


@pytest.mark.parametrize("wrong", [lambda y: y + 1e-4, lambda y: y[::-1], lambda y: y[:1]])
def test_wrong_scores_fail(mean, monkeypatch, wrong):
    right = measure.Session.score
    monkeypatch.setattr(measure, "prove", lambda *_: {})
    monkeypatch.setattr(measure.Session, "score", lambda self, request: wrong(right(self, request)))
    found = measure.row("mean", "dynamo", 300)
    assert not found.passed
    assert "FAILED" in command.table([found])


def die(name, exporter, targets):
    if name == "din":
        os._exit(136)
    return measure.Row(name, exporter, "", 1, targets, refused="no")


def test_a_process_that_dies_costs_one_row():
    asked = [("bst", "dynamo"), ("din", "legacy"), ("sasrec", "dynamo")]
    rows = list(command.rows_of(asked, 2, work=die))
    assert [(r.name, r.refused) for r in rows] == [("bst", "no"), ("din", "the process died"), ("sasrec", "no")]
    assert "refused: the process died" in command.table(rows)


def test_a_refusal_is_a_row(monkeypatch, capsys):
    refused = measure.Row("din", "model", "", 1, 300, refused="no node depends on user inputs alone")
    monkeypatch.setattr(command, "rows_of", lambda *_: iter([refused]))
    assert command.main(["din", "--exporter", "model", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["exporter"], row["parity"]["passed"]) == ("din", "model", False)
    assert row["refused"] == "no node depends on user inputs alone"


def test_a_name_that_is_none_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as e:
        command.main(["dim"])
    assert e.value.code == 2
    assert "'dim' is no model of the gallery" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["din", "multihead"])
def test_rules_in_any_order_gain_alike(name, tmp_path, monkeypatch):
    """Within 1 %: of DIN, slopes before sums take 0.2 % more."""
    model = gallery.load(name)
    onnx_files.write(model, "dynamo", tmp_path / "m.onnx")
    scopes = {n: i.scope for n, i in model.inputs.items()}
    costs = []
    for rules in (RULES, RULES[::-1], ()):
        monkeypatch.setattr(pipeline, "RULES", rules)
        report = pipeline.split_onnx(
            tmp_path / "m.onnx", scopes, tmp_path / "bundle", prove=lambda *_: {}
        ).manifest.split
        hit = report["recomputed_work"] + report["request_work"] + report["target_work"]
        costs.append(report["state_bytes"] * report["flops_per_byte"] + hit)
    assert costs[0] <= costs[1] < 1.01 * costs[0] < costs[2]
