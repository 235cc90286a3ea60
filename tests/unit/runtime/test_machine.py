"""How many processors there are to use: affinity, and a container's quota."""

from __future__ import annotations

import pytest

from stca.runtime import machine
from stca.runtime.machine import processors


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 5, 9}, raising=False)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000\n", 4),
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("100001 100000\n", 2),
        ("350000 100000\n", 4),
        ("99999999 100000\n", 4),
        *((text, 4) for text in ("", "none", "1", "100 0", "é")),
    ],
)
def test_processors(four, tmp_path, quota, expected):
    (tmp_path / "cpu.max").write_text(quota, encoding="utf-8")
    assert processors(tmp_path / "cpu.max") == expected


def test_without_a_quota_or_affinity(four, tmp_path, monkeypatch):
    assert processors(tmp_path / "none") == 4
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    assert processors(tmp_path / "none") == 1
