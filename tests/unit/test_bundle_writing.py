"""Writing a bundle never damages what was there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.bundles import FILES, manifest, write
from support.errors import nothing_or_one_line, one_line
from support.tiny import contents

import stca.bundle as bundle_module
from stca.bundle import Bundle, sha256_of, writing
from stca.errors import BundleError
from stca.manifest import MANIFEST, WEIGHTS


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, root, error):
    before = contents(tmp_path)

    def fail():
        with writing(root) as (work, _):
            (work / "request.onnx").write_bytes(b"half a fi")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["B"]


def test_no_commit_no_change(tmp_path, root):
    before = contents(tmp_path)
    with writing(root) as (work, _):
        (work / "request.onnx").write_bytes(b"x")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "without exchange"])
def test_replacing(tmp_path, root, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(bundle_module.folders, "_exchange", lambda a, b: False)
    write(root, {**FILES, "request.onnx": b"new"})
    assert Bundle.load(root).file("request").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["B"]


def test_replacing_a_damaged_bundle(root):
    """It has a manifest, so it is ours to replace."""
    (root / WEIGHTS).unlink()
    write(root)
    Bundle.load(root)


@pytest.mark.parametrize("there", ["file", "directory", "full directory", "below a file"])
def test_what_is_no_bundle_is_not_replaced(tmp_path, there):
    path = tmp_path / "B"
    if there in ("file", "below a file"):
        path.write_text("precious")
    else:
        path.mkdir()
        if there == "full directory":
            (path / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    target = path / "C" if there == "below a file" else path
    with one_line(BundleError, str(target)):
        write(target)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["B"]


@pytest.mark.parametrize("name", ["notes.txt", "thesis", "old.onnx/notes.json", "weights.safetensors.bak", ".DS_Store"])
def test_a_bundle_with_someones_file_in_it_is_not_replaced(root, name):
    """The manifest alone does not make a directory ours to replace: what else lies there may be precious."""
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("precious")
    before = contents(root)
    with one_line(BundleError, str(root), f"holds {name.partition('/')[0]} beside"):
        write(root)
    assert contents(root) == before


def test_a_linked_target(tmp_path, root):
    """What the link points to is replaced, and the link stays."""
    link = tmp_path / "current"
    link.symlink_to("B")
    write(link, {**FILES, "request.onnx": b"new"})
    assert link.is_symlink()
    for path in (link, root):
        assert Bundle.load(path).file("request").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["B", "current"]


def test_a_dangling_link_as_target(tmp_path):
    (tmp_path / "current").symlink_to("B")
    with nothing_or_one_line(BundleError):
        write(tmp_path / "current")
        assert Bundle.load(tmp_path / "B").path
    assert {p.name for p in tmp_path.iterdir()} <= {"B", "current"}


def test_relative_paths_and_new_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Bundle.load(write(Path("a/b/../c")).path).manifest.files.keys() == FILES.keys()
    assert (tmp_path / "a" / "c" / MANIFEST).is_file()


def test_whoever_may_read_new_files_may_read_the_bundle(tmp_path):
    """A server seldom runs as the user that exported; some libraries write files that only their owner can read."""
    old = os.umask(0o022)
    try:
        with writing(tmp_path / "B") as (work, commit):
            for name, data in FILES.items():
                (work / name).write_bytes(data)
            (work / WEIGHTS).chmod(0o600)
            commit(manifest(sha256_of(work / WEIGHTS)))
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "B").iterdir()}
    assert modes == dict.fromkeys((MANIFEST, *FILES), 0o644)
    assert stat.S_IMODE((tmp_path / "B").stat().st_mode) == 0o755


KILLED = """
import os, signal, sys
from pathlib import Path
import stca.bundle as b

moment, target = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the swap":
    b.folders.put = die
if moment == "after the swap":
    b.shutil.rmtree = die
if moment == "between two renames":
    b.folders._exchange = lambda *_: False
    rename, count = os.rename, []
    def second_dies(*a):
        count.append(a)
        die() if len(count) == 2 else rename(*a)
    b.os.rename = second_dies
old = b.Bundle.load(target).manifest
with b.writing(target) as (work, commit):
    for name in old.files:
        (work / name).write_bytes(b"new")
    if moment == "while writing":
        die()
    commit(b.dataclasses.replace(old, weights=b.sha256_of(work / b.WEIGHTS)))
"""


@pytest.mark.parametrize(
    ("moment", "there"),
    [("while writing", "old"), ("before the swap", "old"), ("after the swap", "new"), ("between two renames", None)],
)
def test_killed(tmp_path, root, moment, there):
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(root)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    aside = [p for p in tmp_path.iterdir() if p != root]
    if there is None:  # only where a file system cannot exchange two names: both are whole, beside the place
        kinds = {Bundle.load(p).file("request").read_bytes() for p in aside}
        assert kinds == {b"whole", b"new"}
        write(root)
        assert set(aside) <= set(tmp_path.iterdir()), "whoever cleans up by hand has the choice"
        return
    assert Bundle.load(root).file("request").read_bytes() == (b"whole" if there == "old" else b"new")
    assert [p.name.startswith(".B.") for p in aside] == [True]
    write(root, {**FILES, "request.onnx": b"third"})
    assert Bundle.load(root).file("request").read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["B"], "what the killed process left is gone"


WRITES_AND_WAITS = """
import sys
import stca.bundle as b
old = b.Bundle.load(sys.argv[1]).manifest
with b.writing(sys.argv[1]) as (work, commit):
    for name in old.files:
        (work / name).write_bytes(b"slow")
    print(work, flush=True)
    sys.stdin.readline()
    commit(b.dataclasses.replace(old, weights=b.sha256_of(work / b.WEIGHTS)))
"""


def test_what_another_process_is_writing_is_left_alone(tmp_path, root):
    command = [sys.executable, "-c", WRITES_AND_WAITS, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            work = Path(other.stdout.readline().strip())
            with writing(root) as (mine, _):  # here, too, someone is writing while others come and go
                write(root, {**FILES, "request.onnx": b"quick"})
                assert mine.is_dir()
            assert {p.name for p in work.iterdir()} == set(FILES)
            other.communicate("go on\n", timeout=30)
            assert other.returncode == 0
        finally:
            other.kill()
    assert Bundle.load(root).file("request").read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["B"]


def test_only_work_directories_of_this_bundle_are_taken_for_left_behind(tmp_path, root):
    kept = [".C.abcdefgh.tmp", ".B.thesis.tmp", ".B.abcdefgh.tmp.old", "B.abcdefgh.tmp", ".B.ABCDEFGH.tmp"]
    gone = [".B.abcd_f00.tmp", ".B.12345678.tmp"]
    for name in (*kept, *gone):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "file").write_text("text")
    (tmp_path / ".B.aaaaaaaa.tmp").write_text("a file")
    (tmp_path / ".B.bbbbbbbb.tmp").symlink_to(tmp_path / kept[0])
    write(root)
    assert {p.name for p in tmp_path.iterdir()} == {"B", *kept, ".B.aaaaaaaa.tmp", ".B.bbbbbbbb.tmp"}
    assert (tmp_path / kept[0] / "below" / "file").read_text() == "text"


def test_without_locks_nothing_is_taken_for_left_behind(tmp_path, root, monkeypatch):
    def no_locks(directory):
        raise OSError("no locks here")

    monkeypatch.setattr(bundle_module.folders, "lock", no_locks)
    (tmp_path / ".B.abcdefgh.tmp").mkdir()
    write(root, {**FILES, "request.onnx": b"new"})
    assert Bundle.load(root).file("request").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == [".B.abcdefgh.tmp", "B"]


def test_a_file_that_another_bundle_shares_keeps_its_mode(root, tmp_path):
    shared = root / "request.onnx"
    shared.chmod(0o644)
    before = os.umask(0o077)
    try:
        with writing(tmp_path / "C") as (work, commit):
            for name, data in FILES.items():
                if name == shared.name:
                    os.link(shared, work / name)
                else:
                    (work / name).write_bytes(data)
            made = commit(manifest(sha256_of(work / WEIGHTS)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o644
    assert stat.S_IMODE((made.path / "user_encoder.onnx").stat().st_mode) == 0o600


def test_what_killed_processes_left_in_the_temporary_folder_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = (
        "import os, signal, stca.bundle as b\n"
        "with b.scratch('stca-engines') as work: print(work, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    with bundle_module.scratch("stca-engines") as first:
        assert not left.exists()
        with bundle_module.scratch("stca-engines") as second:
            assert {first, second} == set(tmp_path.iterdir())  # those in use stay
    assert not list(tmp_path.iterdir())
