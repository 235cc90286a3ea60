"""Short forms of `python tests/fuzz/cpp/fuzz.py` and `python tests/fuzz/replay.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from building import GOLDEN, MISSING, REPOSITORY, command

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to build the C++ runtime")


def test_a_short_run_finds_nothing(build: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    fuzz = [sys.executable, str(REPOSITORY / "tests" / "fuzz" / "cpp" / "fuzz.py"), "--build", str(build)]
    for bundles in ("100", "120"):  # the second goes on where the first stopped
        done = subprocess.run(
            [*fuzz, "--out", str(out), "--calls", "40", "--bundles", bundles],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"bundles: {bundles} rounds" in done.stdout
    print(done.stdout)
    counts = json.loads(out.read_text())["bundles"]["counts"]
    assert counts["bundles"] == 120
    assert counts["load (onnxruntime) ok"] > 5
    assert counts["load (stand-in) bad_bundle"] > 20
    assert counts["score ok"] > 10


def test_manifests_are_taken_as_in_python(build: Path) -> None:
    contracts = [sys.executable, REPOSITORY / "tests" / "fuzz" / "contracts.py", "--build", build]
    output = command(*contracts, "--rounds", "1500")
    taken = re.search(r"1500 manifests, of which Python takes (\d+)", output)
    assert taken is not None
    assert 300 < int(taken[1]) < 1200
    assert "1500 cases" in output


def test_recorded_calls_end_as_in_python(build: Path, onnxruntime_library: Path, tmp_path: Path) -> None:
    """Scores, errors with their text, and statistics; of every kind of call, and something that differs is seen."""
    calls = tmp_path / "calls.json"
    replay = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests" / "fuzz" / "replay.py"), "--build", str(build)]
    done = subprocess.run(
        [*replay, "--out", str(calls), "--rounds", "420"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as expected" in done.stdout
    steps = [step for case in json.loads(calls.read_text())["cases"] for step in case["steps"]]
    kinds = {(step["call"], step.get("error", {}).get("kind")) for step in steps}
    assert {("score", None), ("score_batch", None), ("append", None), ("forget", None), ("swap", None)} <= kinds
    assert {("score", "bad_request"), ("score", "history_needed"), ("append", "bad_request")} <= kinds
    assert {("amend", None), ("amend", "bad_request"), ("score", "deadline"), ("score", "cancelled")} <= kinds
    assert {("restart", None), ("damage", None)} <= kinds
    counted = [step["stats"] for step in steps if step["call"] == "stats"]
    for what in ("evictions", "hits_file", "file_discarded"):
        assert any(stats.get(what) for stats in counted), what

    changed = calls.read_text().replace('"kind": "bad_request"', '"kind": "other"', 1)
    changed = changed.replace("the model has no such input", "is unknown", 1).replace('"misses": 1', '"misses": 2', 1)
    calls.write_text(changed)
    libraries = {"STCA_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
    again = [build / "tests" / "stca_golden", GOLDEN, calls, "--engine", "onnxruntime"]
    done = subprocess.run(
        again, env={**os.environ, **libraries}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 1
    assert (done.stderr + done.stdout).count("recorded") == 3
