"""What a user or their machine caused is never told as a fault of ours."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import safetensors.numpy

from stca import commands
from stca.bundle import Bundle, seal
from stca.commands.explain import EXTRAS, explain
from stca.errors import BundleError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_the_systems_errors(number: int) -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(number, os.strerror(number), "/data/b")
    said, code = explain(error)
    assert said.startswith(f"/data/b: {os.strerror(number)}; ")
    assert code == 2


def test_a_library_in_rust(tmp_path: Path) -> None:
    """safetensors tells the system's errors in its message alone."""
    with pytest.raises(Exception) as caught:
        safetensors.numpy.save_file({}, tmp_path / "no" / "such" / "folder")
    assert "unexpected" not in explain(caught.value)[0]  # type: ignore[arg-type]


def test_errors_of_ours_and_unknown_ones() -> None:
    assert explain(BundleError("a\nb")) == ("a b", 2)
    assert "out of memory" in explain(MemoryError())[0]
    assert "unexpected ZeroDivisionError" in explain(ZeroDivisionError("x"))[0]


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for package, extra in EXTRAS.items():
        names = [re.match(r"[\w-]+", r)[0].replace("-", "_") for r in optional[extra]]  # type: ignore[index]
        assert any(n.startswith(package) for n in names), package


def test_a_missing_package_is_named_with_its_extra(monkeypatch, bundle_dir, capsys) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("stca.report")]:
        monkeypatch.delitem(sys.modules, name)
    assert commands.main(["report", str(bundle_dir)]) == 2
    assert "stca[report]" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(bundle_dir, capsys, tmp_path) -> None:
    """Standard output on a full disk, as a redirected `--json` meets it."""
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stca", "inspect", str(bundle_dir)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


@pytest.mark.parametrize(
    "argv", [["inspect", "{d}/none"], ["score", "{d}", "{d}"], ["verify", "{f}"], ["report", "{f}"]]
)
def test_json_has_the_error_too(argv, tmp_path, capsys) -> None:
    (tmp_path / "f").write_text("{}")
    words = [w.format(d=tmp_path, f=tmp_path / "f") for w in argv]
    assert commands.main([*words, "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["error"] in said.err
    assert "unexpected" not in said.err


ODD = {
    "model": [{"kind": "stca"}, {"kind": 3}, {}, {"kind": "stca", "config": []}],
    "precision": ["float99", "", "int64"],
    "split": [
        {},
        {"workload": "x"},
        {"user_work": None},
        {"notes": "x"},
        {"notes": None},
        {"request_dependencies": [3]},
        {"reasons": "x"},
        {"encoder_nodes": 5},
        {"lifted": []},
        {"rules": [3]},
        {"rules_without_a_place": "x"},
        {"hit_work_without_rules": "x"},
    ],
}


@pytest.mark.parametrize("command", ["inspect", "verify", "report"])
@pytest.mark.parametrize("field", ODD)
def test_a_manifest_that_tells_odd_things(field, command, bundle_dir, tmp_path, capsys) -> None:
    """Resealed, so that its digests are right: one line that names the field."""
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    manifest = Bundle.load(bundle).manifest
    for odd in ODD[field]:
        if not odd and command == "inspect":
            continue  # which shows all else of a bundle that does not tell of its cut
        changed = {**manifest.split, **odd} if field == "split" and odd else odd
        seal(bundle, dataclasses.replace(manifest, **{field: changed}))
        assert commands.main([command, str(bundle)]) == 2, odd
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
        assert len(said) == 1
        assert "unexpected" not in said[0], odd
        assert field in said[0] or "config" in said[0]


def test_a_bundle_that_does_not_tell_of_its_cut_is_inspected(bundle_dir, tmp_path, capsys) -> None:
    """A session serves it, so that inspect shows it; what measures the cut asks for another export."""
    bundle = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    seal(bundle, dataclasses.replace(Bundle.load(bundle).manifest, split={}))
    for why in ([], ["--why"]):
        assert commands.main(["inspect", str(bundle), *why]) == 0
        assert "does not tell of its cut; export it again" in capsys.readouterr().out


# What is missing is told before libraries are loaded for it.
MISSING = [
    (["export", "{d}/none.safetensors", "--out", "o"], ("none.safetensors", "no such checkpoint file")),
    (["export", "--model", "no_such_module:f", "--out", "o"], ("no module 'no_such_module'",)),
    (["export", "--model", "my_model.py", "--out", "o"], ("MODULE:CALLABLE",)),
    (["split", "{d}/manifset.json", "--user-inputs", "a", "--out", "o"], ("no such ONNX file", "'manifest.json'?")),
    (["verify", "{d}", "--model", "no_such_module:f"], ("no module 'no_such_module'",)),
    (["calibrate", "{d}", "--trace", "none", "--precision", "int8", "--out", "o"], ("none", "no such folder")),
    (["refit", "{d}/none", "--checkpoint", "c"], ("no such bundle directory",)),
    (["refit", "{d}", "--checkpoint", "none.st"], ("no such checkpoint file",)),
    (["demo", "--checkpoint", "none.st"], ("no such checkpoint file",)),
    (["bench", "none"], ("no such bundle directory",)),
    (["build", "none", "--engine", "onnxruntime"], ("no such bundle directory",)),
    (["plan", "none"], ("no such bundle directory",)),
    (["score", "none", "r.json"], ("no such bundle directory",)),
    (["score", "{d}", "none.json"], ("none.json", "cannot be read")),
    (["serve", "none"], ("no such bundle directory",)),
    (["load", "none"], ("no such bundle directory",)),
    (["load", "{d}", "--trace", "none"], ("no such file or folder of a trace",)),
    (["schema", "requests", "--bundle", "none"], ("no such bundle directory",)),
]


def test_what_is_missing_is_found_before_libraries_are_loaded(bundle_dir) -> None:
    """All in one process, in which none of them is loaded afterwards."""
    argvs = [[x.format(d=bundle_dir) for x in argv] for argv, _ in MISSING]
    code = (
        "import json, sys; from stca import commands\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    assert commands.main(argv) == 2, argv\n"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'grpc', 'uvicorn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(argvs)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    told = done.stderr.splitlines()
    assert len(told) == len(MISSING)
    for line, (_, words) in zip(told, MISSING, strict=True):
        assert all(word in line for word in words), line
