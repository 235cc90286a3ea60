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

# A module's layer is the folder it lies in: the first below `stca`, and inside a room the second, where a rule names
# it. What lies in `stca` itself is the ground. Each layer sees itself and those named here; nothing else.
MODEL = frozenset({"ground", "plugins", "export"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "ground": frozenset(),
    "plugins": frozenset({"ground"}),
    "runtime": frozenset({"ground", "plugins"}),
    "export": MODEL,
    "export/analysis": frozenset({"ground", "plugins"}),
    "export/passes": frozenset({"ground", "plugins", "export/analysis"}),
    "export/reference": frozenset({"ground", "plugins"}),
    "calibration": MODEL,
    "examples": MODEL | {"calibration", "runtime", "checks", "serve"},
    "checks": MODEL | {"runtime", "calibration"},
    "engines": MODEL | {"runtime", "checks"},
    "serve": frozenset({"ground", "plugins", "runtime"}),
    "load": frozenset({"ground", "plugins", "runtime", "serve"}),
    "report": MODEL | {"runtime", "checks", "examples"},
    "commands": MODEL | {"runtime", "calibration", "examples", "checks", "engines", "report", "serve", "load"},
}
# What `python -m stca` runs: a door, not ground.
DOOR = ("__main__",)


def modules() -> list[Path]:
    """Every module of the package, by its path below `src/stca`; links to rooms are followed."""
    return sorted(p for folder in (SOURCE, *(SOURCE / r for r in ROOMS)) for p in _python_files(folder))


def _python_files(folder: Path) -> list[Path]:
    below = folder.rglob("*.py") if folder != SOURCE else [*folder.glob("*.py"), *_packages_of_the_root()]
    return [p for p in below if "cpp" not in p.relative_to(SOURCE).parts]


def _packages_of_the_root() -> list[Path]:
    return [f for p in SOURCE.iterdir() if p.is_dir() and p.name not in ROOMS for f in p.rglob("*.py")]


def layer(parts: tuple[str, ...]) -> str:
    """The layer of a module by its path below `stca`: `("export", "analysis", "cut")` is of `export/analysis`."""
    names = ["/".join(parts[:n]) for n in (2, 1) if (SOURCE / Path(*parts[:n])).is_dir()]
    return next((n for n in names if n in MAY_IMPORT), "ground")


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
    parts = file.relative_to(SOURCE).with_suffix("").parts
    wrong = {x for x in imported(file) if not may_import(layer(parts), layer(x[1])) and parts != DOOR}
    return [f"{file.relative_to(SOURCE)}:{line} imports stca.{'.'.join(name)}" for line, name in sorted(wrong)]


def may_import(mine: str, other: str) -> bool:
    """Whether one layer may import another; to those outside of a room its folders are the room."""
    return other == mine or not MAY_IMPORT[mine].isdisjoint({other, other.split("/")[0]})


def test_every_module_is_looked_at():
    names = {str(p.relative_to(SOURCE)) for p in modules()}
    assert {
        "bundle.py",
        "commands/export.py",
        "export/analysis/cut.py",
        "plugins/spec.py",
        "runtime/session.py",
    } <= names
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
        "runtime/a.py": "from stca.export.pipeline import resolve",
        "runtime/b.py": "import stca.checks.verify",
        "runtime/c.py": "def f():\n    from stca import commands",
        "runtime/d.py": "from ..export import pipeline",
        "plugins/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import stca.runtime",
        "export/a.py": "import stca.calibration.ranges as r",
        "export/analysis/a.py": "from stca.export.passes.lower import lower",
        "export/passes/a.py": "from stca.export import pipeline",
        "checks/a.py": "from stca.engines import build",
        "bundle.py": "from stca.runtime import Session",
        "probe.py": "from stca.checks import verify",
    }
    for folder in MAY_IMPORT:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        assert violations(tmp_path / name), name
    allowed = {
        "commands/a.py": "from stca.checks import verify\nfrom stca.export import pipeline\nimport stca.runtime",
        "runtime/e.py": "from stca.bundle import Bundle\nfrom . import state\nimport numpy",
        "export/passes/b.py": "from stca.export.analysis.scope import scopes",
        "export/b.py": "from stca.export.passes import lower\nfrom stca import probe",
    }
    for name, text in allowed.items():
        (tmp_path / name).write_text(text)
        assert not violations(tmp_path / name), name


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


def test_choosing_engines_loads_no_compiler_of_kernels(bundle_dir):
    """A server looks at the machine and ranks engines; what builds kernels and engines has no part in that."""
    script = (
        "import sys; from stca.runtime import Session; from stca.runtime.engine_choice import Machine; "
        "from stca.backends import BACKENDS; Machine.here(); [b.server() for b in BACKENDS.values()]; "
        "Session.load(sys.argv[1], threads=1); print(*sorted(m for m in sys.modules if m.startswith('stca.')))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(bundle_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert not [m for m in loaded if m.startswith(("stca.engines", "stca.export", "stca.checks"))]
    assert {m for m in loaded if m.startswith("stca.plugins.")} <= {"stca.plugins.driver"}


def test_an_engine_is_built_anew_when_what_makes_its_graph_has_changed():
    """Of the export, every module that the making of an engine's graph imports is in the key of the engine cache."""
    from stca.engines.build import _BUILDER

    seen, waiting = set(), [("export", "engine_graph")]
    while waiting:
        file = (SOURCE / Path(*waiting.pop())).with_suffix(".py")
        if file not in seen and file.is_file():
            seen.add(file)
            waiting += [parts for _, parts in imported(file) if parts[:1] == ("export",)]
    needed = {str(file.relative_to(SOURCE)) for file in seen}
    assert len(needed) > 5
    assert needed <= set(_BUILDER)
