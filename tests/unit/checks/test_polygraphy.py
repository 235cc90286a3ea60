"""What the engines' page says of Polygraphy, run as it is printed, on a CPU."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install polygraphy")
PAGE = (
    (Path(__file__).parents[3] / "docs/engines.md").read_text(encoding="utf-8").partition("### Further, with Poly")[2]
)


def block(language: str) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)[0]


def test_a_graph_is_run_with_every_value_as_an_output(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polygraphy.json import load_json

    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle_dir, "bundle")
    Path("example.py").write_text(block("python"))
    runpy.run_path("example.py")
    for command in block("sh").splitlines():
        tool, *words = command.split()
        assert tool == "polygraphy"
        code = "import sys; from polygraphy.tools import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ((_, (outputs,)),) = load_json("onnx.json").items()
    nodes = onnx.load("scorer.onnx", load_external_data=False).graph.node
    products = {name for node in nodes if node.op_type == "MatMul" for name in node.output}
    assert len(products) > 10
    assert products <= set(outputs)
    assert outputs["scores"].shape == (20, 2)
