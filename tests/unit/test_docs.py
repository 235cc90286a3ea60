"""What the documents name is there, the notebook runs, the API reference builds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])

MADE = ("plugins/tiles.json",)  # by a benchmark on a GPU


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.M)
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_are_there(page: Path) -> None:
    folders = "src|tests|export|plugins|runtime|calibration|examples|benchmarks|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8")):
        assert "NAME" in path or path in MADE or (ROOT / path).exists(), path


def test_every_result_is_on_a_page() -> None:
    told = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for result in (ROOT / "benchmarks" / "results").iterdir():
        assert f"benchmarks/results/{result.name}" in told, result.name


def test_the_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    changes = text.split("## Where do I put")[1].split("\n## ")[0]
    paths = [p for p in re.findall(r"`([\w./]+/[\w./]*)`", changes) if "NAME" not in p]
    assert len(paths) > 20
    for path in paths:
        assert any((base / path).exists() for base in (ROOT, ROOT / "src" / "stca", ROOT / "src/stca/report")), path
    folders = re.findall(r"^\| `([^`]+)` \|", text.split("## Where")[0], re.M)
    assert len(folders) > 10
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


def test_the_dockerfile_copies_what_the_package_needs() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [w for line in lines if line.startswith("COPY") and "--from" not in line for w in shlex.split(line)[1:-1]]
    for path in copied:
        assert (ROOT / path).exists(), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = {p.split(".")[1] for p in project["tool"]["setuptools"]["packages"] if "." in p}
    at_the_top = {room for room in rooms if (ROOT / room).is_dir()}
    assert at_the_top | {"src", "pyproject.toml", project["project"]["readme"], "LICENSE"} <= set(copied)


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells in order, as a program."""
    notebook = json.loads((ROOT / "examples" / "notebooks" / "first_scores.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    code = "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "notebook-out" / "report.html").is_file()


def test_the_api_reference_builds(tmp_path: Path) -> None:
    """Of a server's modules, which load fast; `make api` takes the rest."""
    modules = re.search(r"^API := ((?:.|\\\n)*?)\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert modules
    for name in modules[1].replace("\\\n", " ").split():
        assert any((ROOT / "src" / Path(*name.split("."))).with_suffix(s).exists() for s in ("", ".py")), name
    command = [
        sys.executable,
        "-m",
        "pdoc",
        "--docformat",
        "google",
        "-o",
        str(tmp_path),
        "stca.runtime",
        "stca.bundle",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "stca" / "runtime.html").read_text(encoding="utf-8")
    assert "cache_bytes" in page
    assert "Session" in page
