"""What the C++ fuzzer's command makes of what goes wrong. Its short form runs with the C++ runtime's own tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fuzz


def test_what_goes_wrong_is_kept(tmp_path: Path) -> None:
    program = tmp_path / "stca_fuzz"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nprint('round 7\\nround 8\\nWRONG not one line\\nround 9')\n"
        "print('SUMMARY: AddressSanitizer: heap-buffer-overflow', file=sys.stderr)\nsys.exit(134)\n"
    )
    program.chmod(0o755)
    state: dict[str, Any] = {"next": 7, "counts": {}, "wrong": []}
    fuzz.run(program, "bundles", 1, 10, state)
    assert [one["round"] for one in state["wrong"]] == [8, 9]
    assert "heap-buffer-overflow" in state["wrong"][1]["what"]
    assert state["next"] == 10
