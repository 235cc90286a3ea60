"""Rooms and doors: who may import whom, read off every module's source, and what a server's import costs."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "stca"
ROOMS = ("plugins", "export", "calibration", "runtime", "examples")

# root ← plugins ← export ← calibration; root, plugins ← runtime. The root's leaves (errors, types, the artifact, the
# table of TensorRT's flavours) see only each other; its other modules are the checks and the command line, which see
# everything.
LEAVES = frozenset({"errors", "types", "typed_json", "bundle", "probe", "tensorrt_flavours", "__init__"})
MAY_IMPORT = {
    "plugins": {"leaves", "plugins"},
    "export": {"leaves", "plugins", "export"},
    "calibration": {"leaves", "plugins", "export", "calibration"},
    "runtime": {"leaves", "plugins", "runtime"},
    "examples": {"leaves", "plugins", "export", "calibration", "examples"},
    "leaves": {"leaves"},
    "checks": {"leaves", "checks", *ROOMS},
}


def modules() -> list[Path]:
    """Every module of the package, by its path below `src/stca`; links to rooms are followed."""
    return sorted(p for folder in (SOURCE, *(SOURCE / r for r in ROOMS)) for p in _python_files(folder))


def _python_files(folder: Path) -> list[Path]:
    below = folder.rglob("*.py") if folder != SOURCE else [*folder.glob("*.py"), *_packages_of_the_root()]
    return [p for p in below if "cpp" not in p.relative_to(SOURCE).parts]


def _packages_of_the_root() -> list[Path]:
    return [f for p in SOURCE.iterdir() if p.is_dir() and p.name not in ROOMS for f in p.rglob("*.py")]


def place(parts: tuple[str, ...]) -> str:
    """Which layer a module is of, by its path below `stca` (`("export", "model")`)."""
    if parts and parts[0] in ROOMS:
        return parts[0]
    return "leaves" if not parts or parts[0] in LEAVES else "checks"


def imported(file: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Modules of `stca` that a file imports, anywhere in it, as line and path below `stca`."""
    found = []
    package = ("stca", *file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{a.name}" if base == "stca" else base for a in node.names]
        found += [(node.lineno, tuple(n.split(".")[1:])) for n in names if n.split(".")[0] == "stca"]
    return found


def violations(file: Path) -> list[str]:
    mine = place(file.relative_to(SOURCE).with_suffix("").parts)
    wrong = {(line, name) for line, name in imported(file) if place(name) not in MAY_IMPORT[mine]}
    return [f"{file.relative_to(SOURCE)}:{line} imports stca.{'.'.join(name)}" for line, name in sorted(wrong)]


def test_every_module_is_looked_at():
    names = {str(p.relative_to(SOURCE)) for p in modules()}
    assert {"bundle.py", "cli.py", "export/model.py", "plugins/spec.py", "runtime/session.py"} <= names
    assert len(names) > 20


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(file):
    assert not violations(file)


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_rooms_are_imported_by_their_full_name(file):
    """`import export` finds the folder when run from a checkout, and nothing, or a second copy, anywhere else."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not {n.split(".")[0] for n in names} & set(ROOMS), f"line {node.lineno}"


def test_the_rule_can_fail(tmp_path, monkeypatch):
    """The checker itself, on modules that break the rule in each way a module can."""
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    cases = {
        "runtime/a.py": "from stca.export.model import Stca",
        "runtime/b.py": "import stca.verify",
        "runtime/c.py": "def f():\n    from stca import cli",
        "runtime/d.py": "from ..export import model",
        "plugins/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import stca.runtime",
        "export/a.py": "import stca.calibration.ranges as r",
        "bundle.py": "from stca.runtime import Session",
        "probe.py": "from stca import verify",
    }
    for name, text in cases.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        assert violations(file), name
    (tmp_path / "cli.py").write_text("from stca import verify\nfrom stca.export import pipeline\nimport stca.runtime")
    assert not violations(tmp_path / "cli.py")
    (tmp_path / "runtime" / "e.py").write_text("from stca.bundle import Bundle\nfrom . import state\nimport numpy")
    assert not violations(tmp_path / "runtime" / "e.py")


def test_ruff_refuses_imports_of_bare_rooms(tmp_path):
    banned = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["flake8-tidy-imports"]
    assert set(ROOMS) <= banned["banned-api"].keys()
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed: pip install ruff")
    for text in ("import export.model", "from runtime import Session", "from plugins.spec import DOMAIN"):
        (tmp_path / "x.py").write_text(f"{text}\n")
        command = [ruff, "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), "--select", "TID251", "x.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "TID251" in done.stdout, text


HEAVY = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "triton", "networkx", "matplotlib", "ml_dtypes")


@pytest.mark.parametrize("module", ["stca", "stca.errors", "stca.bundle", "stca.probe", "stca.runtime"])
def test_a_server_is_light(module):
    """In a fresh interpreter: neither torch nor onnx, nor anything else that only an export needs."""
    script = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & set(HEAVY)
    if module in ("stca", "stca.errors", "stca.bundle"):
        assert not loaded & {"numpy", "onnxruntime"}


def test_a_served_request_stays_light(bundle_dir):
    """Nothing heavy is imported late either, when a bundle is loaded and asked."""
    script = (
        "import sys, numpy as np; from stca.runtime import Session, Request; from stca import probe; "
        "s = Session.load(sys.argv[1], threads=1); "
        "r = probe.single(s.manifest.graphs['request'].inputs, 3, 2, np.random.default_rng(0)); "
        "s.score(Request(r, user='u')); s.append('u', {n: x for n, x in r.items() if n.startswith('history')}, 2); "
        "s.swap(sys.argv[1]); s.forget('u'); print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle_dir)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & set(HEAVY)


def test_the_public_names_of_the_runtime():
    import stca.runtime

    assert {"Session", "Request", "RequestBatch"} <= set(stca.runtime.__all__)
    assert {"load", "score", "append", "forget", "swap"} <= set(dir(stca.runtime.Session))
    for name in stca.runtime.__all__:
        assert getattr(stca.runtime, name).__doc__
