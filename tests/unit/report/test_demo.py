"""The demo on a checkpoint of another log than the generated one."""

from __future__ import annotations

from support import tiny

from stca.export.reference.checkpoint import save_checkpoint
from stca.report.demo import demo


def test_a_checkpoint_of_another_log_gets_its_report(tmp_path):
    save_checkpoint(tmp_path / "own.safetensors", tiny.module(tiny.config()))
    told: list[str] = []
    result = demo(tmp_path / "out", checkpoint=tmp_path / "own.safetensors", progress=told.append)
    assert result.auc == []
    assert "not of the generated log" in result.report.read_text(encoding="utf-8")
    assert result.latency.rows
    assert "AUC" not in result.summary
