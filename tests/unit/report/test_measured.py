"""A report of one's own bundle: the sizes it measures, and the command that writes it."""

from __future__ import annotations

import dataclasses

import pytest

from stca import commands
from stca.bundle import Bundle
from stca.manifest import Manifest
from stca.report.measured import sizes
from stca.specs import TensorSpec


def _taking(manifest: Manifest, max_history: int | None, *inputs: TensorSpec) -> Manifest:
    graph = dataclasses.replace(manifest.graphs["request"], inputs=inputs)
    return dataclasses.replace(manifest, max_history=max_history, graphs={**manifest.graphs, "request": graph})


@pytest.mark.parametrize(
    ("max_history", "history", "target", "expected"),
    [
        (None, "N_h", "N_t", ((512, 2048, 10_000), (32, 300))),
        (256, "N_h", "N_t", ((16, 64, 256), (32, 300))),
        (3, "N_h", "N_t", ((1, 3), (32, 300))),
        (None, 50, "items", ((50,), (32, 300))),
        (None, "events", 1, ((512, 2048, 10_000), (1,))),
    ],
)
def test_sizes_are_those_the_model_can_vary(bundle_dir, max_history, history, target, expected):
    inputs = (TensorSpec("h", "int64", (1, history), "user"), TensorSpec("t", "int64", (target,), "target"))
    assert sizes(_taking(Bundle.load(bundle_dir).manifest, max_history, *inputs)) == expected


def test_a_report_of_any_bundle(bundle_dir, tmp_path, capsys):
    page = tmp_path / "page.html"
    argv = ["report", str(bundle_dir), "--out", str(page), "--history", "8", "--targets", "2", "--seconds", "0.01"]
    assert commands.main(argv) == 0
    text = page.read_text(encoding="utf-8")
    assert "takes a log with outcomes" in text  # no AUC, and why
    assert "2 candidates per request" in text
    assert str(page) in capsys.readouterr().out
