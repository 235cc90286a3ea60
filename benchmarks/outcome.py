"""What a benchmark leaves: the command that made it, and its result on stdout and in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def command() -> str:
    """The command that runs, as a reader would repeat it."""
    return "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def tell(result: Mapping[str, Any], out: str | Path | None) -> None:
    """Print a result as JSON, and write it to `out` where one is given."""
    text = json.dumps(result, indent=1)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(text)
