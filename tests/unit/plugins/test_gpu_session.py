"""The GPU session's bookkeeping, on steps that stand in for the real ones: a crash or a hang costs one step alone."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# What each stands for: a step that ends well, one that writes and crashes, one that writes and hangs.
STEPS = {
    "parity": "write({'parity': {'checks': [1, 2]}})",
    "speed": "write({'rows': [1, 2, 3]}); raise SystemExit('lost the GPU')",
    "tune": "write({'tuned': [1]}); time.sleep(60)",
    "ptx": "write({'rows': [1], 'skipped_for_time': 7})",
}
PRELUDE = "import json, sys, time; write = lambda x: open(sys.argv[1], 'w').write(json.dumps(x));"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_session

    monkeypatch.setattr(gpu_session, "SECONDS", {**dict.fromkeys(STEPS, 60), "tune": 2})
    monkeypatch.setattr(gpu_session, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(gpu_session, "GPU", True)
    monkeypatch.setattr(gpu_session.torch.cuda, "get_device_name", lambda: "a GPU")
    return gpu_session  # type: ignore[no-any-return]


def call(session: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> tuple[Any, dict[str, int]]:
    """One call of the command: the file it leaves, and the rows each started step was told to leave out."""
    started: dict[str, int] = {}

    def command(name: str, seconds: float, result: Path, out: Path, skip: int) -> list[str]:
        started[name] = skip
        return [sys.executable, "-c", PRELUDE + STEPS[name], str(result)]

    monkeypatch.setattr(session, "command", command)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", str(out), *words])
    session.main()
    return json.loads(out.read_text()), started


def test_a_crash_and_a_hang_cost_one_step_and_the_next_call_goes_on(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "session.json"
    written, started = call(session, monkeypatch, out)
    assert started == dict.fromkeys(STEPS, 0)
    assert {name: step["status"] for name, step in written["steps"].items()} == {
        "parity": "done",
        "speed": "failed with exit status 1",
        "tune": "stopped after 2 s",
        "ptx": "not done: 7 rows left",
    }
    assert [step["results"] for step in written["steps"].values()] == [
        [{"parity": {"checks": [1, 2]}}],
        [{"rows": [1, 2, 3]}],
        [{"tuned": [1]}],
        [{"rows": [1], "skipped_for_time": 7}],
    ]
    assert "lost the GPU" in written["steps"]["speed"]["said"]

    monkeypatch.setitem(STEPS, "speed", "write({'rows': [4]})")
    written, started = call(session, monkeypatch, out)
    assert started == {"speed": 3, "tune": 0, "ptx": 1}
    assert written["steps"]["speed"]["status"] == "done"
    assert written["steps"]["speed"]["results"] == [{"rows": [1, 2, 3]}, {"rows": [4]}]

    _, started = call(session, monkeypatch, out, "--steps", "parity")
    assert started == {"parity": 0}


def test_no_step_starts_when_the_time_is_up(
    session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, started = call(session, monkeypatch, tmp_path / "session.json", "--limit", "0")
    assert not started
    assert {step["status"] for step in written["steps"].values()} == {"not done: the call's time is up"}


def test_without_a_gpu_a_step_says_so(session: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "GPU", False)
    written, started = call(session, monkeypatch, tmp_path / "session.json", "--steps", "ptx")
    assert not started
    assert written["steps"]["ptx"]["status"] == "not done: torch sees no NVIDIA GPU"


def test_every_step_has_a_command_that_exists(session: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in session.SECONDS:
        words = session.command(name, 100.0, Path("result.json"), Path("session.json"), 0)
        files = [word for word in words if word.startswith(("benchmarks/", "tests"))]
        assert any((session.ROOT / file).exists() for file in files) or find_spec(words[words.index("-m") + 1])
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", "x", "--steps", "sped"])
    with pytest.raises(SystemExit):
        session.main()


def test_one_call_has_a_speed_before_it_has_the_suite_and_ends_in_time(
    session: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--out", "x"])
    steps, limit = list(session.SECONDS), session._arguments().limit
    first = steps[: steps.index("tests") + 1]
    assert first == ["smoke", "headline", "ptx", "parity", "tune", "tests"]
    assert sum(session.SECONDS[name] for name in first) <= limit
    words = session.command("headline", 140.0, Path("result.json"), Path("session.json"), 2)
    assert words[words.index("--skip") + 1] == "2"
    assert words[words.index("--targets") + 1] == "8,300"


def test_outcomes_are_counted_with_and_without_workers(session: ModuleType) -> None:
    text = """
tests/gpu/test_a.py::test_one[x] PASSED  [ 25%]
[gw1] [ 50%] FAILED tests/gpu/test_a.py::test_two[y]
tests/gpu/test_a.py::test_three SKIPPED (no GPU) [ 75%]
FAILED tests/gpu/test_a.py::test_two[y] - AssertionError
"""
    assert session.outcomes(text) == {
        "FAILED": 1,
        "PASSED": 1,
        "SKIPPED": 1,
        "wrong": ["tests/gpu/test_a.py::test_two[y]"],
    }
