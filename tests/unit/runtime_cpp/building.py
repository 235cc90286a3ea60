"""How the C++ runtime is built for its tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
GOLDEN = HERE / "golden"
# Unoptimised: the sanitizers make optimised code three times as long to compile, and the tests are short.
FLAGS = "-O0 -g1"
SANITIZERS = "address,undefined"
MISSING = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]


def command(*arguments: str | Path, **options: Any) -> str:
    """Run a command and return what it printed; its whole output is the failure's message."""
    done = subprocess.run(
        list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800, **options
    )
    output: str = done.stdout
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{output[-5000:]}"
    return output


def configure(source: Path, build: Path, *settings: str) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command("cmake", "-S", source, "-B", build, *generator, "-DCMAKE_BUILD_TYPE=None", *settings)
