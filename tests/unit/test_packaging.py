"""It works from any copy: a tree whose links became text files, a source distribution, and the wheel built of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/bundle-v1"
ROOMS = ("calibration", "examples", "export", "plugins", "runtime")
# What tools leave in a tree and is no part of it.
LEFT = (".git", ".venv", ".whl", "build", "dist", "demo-out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def python(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run this interpreter, with the package taken from `path`."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(root: Path) -> set[str]:
    names = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    return {n for n in names if ".egg-info/" not in n}


def build(kind: str, tree: Path, out: Path) -> Path:
    """What `pip` does in an environment that has setuptools: no network, no isolation."""
    python("-c", f"from setuptools.build_meta import build_{kind} as b; b({str(out)!r})", cwd=tree)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it is here, links and all."""
    ignore = shutil.ignore_patterns(*LEFT)
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "tree", symlinks=True, ignore=ignore)


@pytest.fixture(scope="module")
def without_links(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a zip unpacked by Python, or a clone with core.symlinks=false: a link is a file with its target."""
    tree = shutil.copytree(copy, tmp_path_factory.mktemp("without") / "tree", symlinks=True)
    for link in [p for p in tree.rglob("*") if p.is_symlink()]:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    return tree


@pytest.fixture(scope="module")
def unpacked_sdist(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", copy, root / "out")) as archive:
        archive.extractall(root / "tree", filter="data")
    return next((root / "tree").iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution, unpacked as an install does."""
    root = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", unpacked_sdist, root / "out")) as archive:
        archive.extractall(root / "site")
    return root / "site"


def test_a_copy_without_links_serves(without_links, tmp_path):
    shown = python("-m", "stca", "inspect", str(GOLDEN), "--json", cwd=tmp_path, path=without_links / "src")
    assert json.loads(shown)["weights"]
    command = ("-m", "stca", "build", str(GOLDEN), "--engine", "onnxruntime", "--dry-run", "--json")
    assert json.loads(python(*command, cwd=tmp_path, path=without_links / "src"))  # reads the builder's sources


def test_a_copy_without_links_has_every_room(without_links, tmp_path):
    script = f"import importlib as i; print(*[i.import_module('stca.' + r).__file__ for r in {ROOMS}])"
    found = python("-c", script, cwd=tmp_path, path=without_links / "src").split()
    assert found == [str(without_links / room / "__init__.py") for room in ROOMS]


def test_the_source_distribution_is_the_whole_tree_once(without_links, unpacked_sdist, tmp_path):
    added = {"PKG-INFO", "setup.cfg"}
    lost = {f"src/stca/{room}" for room in ROOMS}
    assert files(unpacked_sdist) - added == files(without_links) - lost
    with tarfile.open(build("sdist", without_links, tmp_path)) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert {n for n in names if ".egg-info/" not in n} == files(unpacked_sdist)


def test_a_copy_without_links_makes_the_same_wheel(without_links, wheel, tmp_path):
    with zipfile.ZipFile(build("wheel", without_links, tmp_path)) as archive:
        assert set(archive.namelist()) == files(wheel)


def test_the_wheel_has_every_module_and_what_they_read(wheel):
    names = {n.removeprefix("stca/") for n in files(wheel) if n.startswith("stca/")}
    assert {"examples/checkpoints/stca_demo.safetensors", "report/templates/report.html", "py.typed"} <= names
    assert {"plugins/cpp/plugin.cc", "plugins/cpp/CMakeLists.txt"} <= names
    modules = {p.relative_to(ROOT / "src/stca").as_posix() for p in (ROOT / "src/stca").rglob("*.py")}
    modules |= {p.relative_to(ROOT).as_posix() for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    assert modules
    assert modules <= names


def test_the_wheel_exports_in_an_empty_directory(wheel, checkpoint_file, tmp_path):
    """Nothing of the checkout is in reach: the package is the wheel's, and the directory is empty."""
    command = ("-m", "stca", "export", str(checkpoint_file("log")), "--out", "bundle", "--json")
    assert json.loads(python(*command, cwd=tmp_path, path=wheel))["parity"]["passed"]
    where = python("-c", "import stca; print(stca.__file__)", cwd=tmp_path, path=wheel)
    assert where.strip() == str(wheel / "stca" / "__init__.py")
