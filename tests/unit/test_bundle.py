"""The artifact on disk: what is wrong with it is refused in one line, and writing it never damages what was there."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.errors import nothing_or_one_line, one_line
from support.tiny import contents

import stca.bundle as bundle_module
from stca import opening
from stca.bundle import Bundle, seal, sha256_of, writing
from stca.errors import BuildError, BundleError
from stca.manifest import FORMAT_VERSION, MANIFEST, WEIGHTS, EngineEntry, Manifest
from stca.specs import GraphSpec, StateSpec, TensorSpec

FILES = {"request.onnx": b"whole", "user_encoder.onnx": b"first half", "target_scorer.onnx": b"", WEIGHTS: b"\0\1\2\3"}
GOLDEN_FILES = Path(__file__).parents[1] / "golden"
HISTORY = TensorSpec("history_item", "int64", ("N_h",), "user", 9)
TARGET = TensorSpec("target_item", "int64", ("N_t",), "target", 9)
STATE = StateSpec("state", "float32", ("N_h", 4), 16)
SCORES = TensorSpec("scores", "float32", ("N_t", 2))


def manifest(weights: str) -> Manifest:
    state = TensorSpec("state", "float32", ("N_h", 4))
    return Manifest(
        model={"kind": "onnx"},
        weights=weights,
        precision="float32",
        attention=None,
        graphs={
            "request": GraphSpec("request.onnx", (HISTORY, TARGET), (SCORES,)),
            "user_encoder": GraphSpec("user_encoder.onnx", (HISTORY,), (state,)),
            "target_scorer": GraphSpec("target_scorer.onnx", (state, TARGET), (SCORES,)),
        },
        state=(STATE,),
        appendable=True,
        max_history=100,
        split={"bytes_per_token": 16},
        parity={"passed": True},
        producer={"stca": "0"},
    )


def write(path: Path, files: dict[str, bytes] = FILES) -> Bundle:
    with writing(path) as (work, commit):
        for name, data in files.items():
            (work / name).write_bytes(data)
        return commit(manifest(sha256_of(work / WEIGHTS)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "B").path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that hypothesis may break, as long as each example mends it."""
    return write(tmp_path_factory.mktemp("scratch") / "B").path


def edit(root: Path, change) -> None:
    raw = json.loads((root / MANIFEST).read_text())
    change(raw)
    (root / MANIFEST).write_text(json.dumps(raw))


def test_what_is_written_is_what_is_loaded(tmp_path):
    written = write(tmp_path / "B")
    loaded = Bundle.load(tmp_path / "B")
    assert loaded == written
    assert loaded.file("request").read_bytes() == b"whole"
    assert set(loaded.manifest.files) == set(FILES)
    assert os.listdir(tmp_path) == ["B"]
    assert Bundle.load(str(tmp_path / "B")) == loaded


def test_the_manifests_text_is_fixed():
    """Golden bytes: whoever changes them changes the format, and has a version to raise and old files to read."""
    text = manifest("00").to_json()
    assert text == (GOLDEN_FILES / "manifest-v1.json").read_text(encoding="utf-8")
    assert Manifest.from_json(text) == manifest("00")
    assert Manifest.from_json(text).to_json() == text


def test_a_bundle_of_version_1_is_served_for_ever(tmp_path):
    """Made by `tests/golden/make.py` when the version was young: what people have must load, and answer the same."""
    from stca.runtime import Request, Session

    shutil.copytree(GOLDEN_FILES / "bundle-v1", tmp_path / "B")
    asked = json.loads((GOLDEN_FILES / "bundle-v1.json").read_text())
    session = Session.load(tmp_path / "B", threads=1)
    for user in (None, "u", "u"):
        scores = session.score(Request(asked["inputs"], user=user))
        np.testing.assert_allclose(scores, asked["scores"], rtol=0, atol=1e-6)
    assert (session.stats().hits, session.manifest.max_history, session.manifest.attention) == (1, 16, "absorbed")
    assert sum(p.stat().st_size for p in (tmp_path / "B").iterdir()) < 100_000


# --- files ------------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_in_any_file(scratch, data):
    name = data.draw(st.sampled_from([n for n, x in FILES.items() if x]))
    before = (scratch / name).read_bytes()
    at, flip = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(1, 255))
    (scratch / name).write_bytes(before[:at] + bytes([before[at] ^ flip]) + before[at + 1 :])
    try:
        with one_line(BundleError, name, "changed", "copy it again"):
            Bundle.load(scratch)
    finally:
        (scratch / name).write_bytes(before)
    Bundle.load(scratch)


@given(st.data())
def test_a_changed_byte_in_the_manifest_is_refused_or_means_the_same(scratch, data):
    before = (scratch / MANIFEST).read_bytes()
    intact = Bundle.load(scratch).manifest
    at, flip = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(1, 255))
    (scratch / MANIFEST).write_bytes(before[:at] + bytes([before[at] ^ flip]) + before[at + 1 :])
    try:
        with nothing_or_one_line(BundleError):
            assert Bundle.load(scratch).manifest == intact
    finally:
        (scratch / MANIFEST).write_bytes(before)


@pytest.mark.parametrize("name", [n for n, x in FILES.items() if x])
def test_truncated_and_grown(root, name):
    data = (root / name).read_bytes()
    for changed in (data[:-1], b"", data + b"\0"):
        (root / name).write_bytes(changed)
        with one_line(BundleError, name, str(len(data)), str(len(changed)), "copy it again"):
            Bundle.load(root)


def test_a_manifest_without_an_end_is_not_read_to_it(root, tmp_path):
    os.truncate(root / MANIFEST, 1 << 40)  # takes no place on the disk; read whole, it would take a terabyte of memory
    with one_line(BundleError, MANIFEST, "16 MiB"):
        Bundle.load(root)
    with one_line(BundleError, MANIFEST, "16 MiB"):
        bundle_module.sign(root, tmp_path / "key")
    write(root)  # a damaged bundle is replaced
    assert Bundle.load(root)


def test_a_manifest_cut_short_anywhere(root):
    text = (root / MANIFEST).read_bytes()
    for length in range(0, len(text) - 1, 7):
        (root / MANIFEST).write_bytes(text[:length])
        with one_line(BundleError, MANIFEST):
            Bundle.load(root)


def touched(root):
    """As another process would leave it that writes the same bundle again and again."""
    (root / WEIGHTS).write_bytes((root / WEIGHTS).read_bytes())


def test_what_fails_while_the_bundle_is_replaced_is_told(root):
    calls = []

    def use(found):
        calls.append(found.path)
        shutil.copy2(root / WEIGHTS, root.parent / "new")
        os.replace(root.parent / "new", root / WEIGHTS)
        raise BuildError("the engine does not fit")

    with one_line(BuildError, "the engine does not fit"):
        opening.opened(root, use, tries=20)
    assert calls[0] == root
    assert calls[-1] != root


def test_a_copy_that_is_written_to_is_read_again(root):
    calls = []

    def use(found):
        calls.append(found.path)
        if len(calls) < 6:
            touched(found.path)
        return len(calls)

    assert opening.opened(root, use) == 6
    assert calls[5].parent != root.parent


def test_a_copy_of_a_bundle_that_was_being_removed_is_made_again(root, monkeypatch):
    whole, copies = opening._copy, []

    @contextlib.contextmanager
    def copy(path):
        with whole(path) as place:
            copies.append(place)
            if len(copies) == 1:  # as if these names were read while another process removed them
                (place / MANIFEST).unlink()
                touched(root)
            yield place

    def use(found):
        if found.path == root:
            touched(root)
        return found.path

    monkeypatch.setattr(opening, "_copy", copy)
    assert opening.opened(root, use) == copies[1]


def test_the_last_error_is_told_where_a_bundle_is_never_at_rest(root, monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(opening, "_identity", lambda *_: next(numbers))
    (root / WEIGHTS).unlink()
    with one_line(BundleError, "replaced faster", WEIGHTS, "is missing"):
        opening.opened(root, lambda found: found, tries=5)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_missing_file(root, name):
    (root / name).unlink()
    with one_line(BundleError, name):
        Bundle.load(root)


@pytest.mark.parametrize("name", ["extra.txt", "plan.engine", "a\nb"])
def test_an_extra_file(root, name):
    (root / name).touch()
    with one_line(BundleError, repr(name)[1:-1], "not in the manifest"):
        Bundle.load(root)


def test_what_file_managers_leave_is_looked_over(root):
    (root / ".DS_Store").touch()
    (root / ".Trash").mkdir()
    Bundle.load(root)


def test_a_file_in_place_of_a_bundle(root):
    with one_line(BundleError, "is a file", "folder"):
        Bundle.load(root / MANIFEST)


def test_a_place_that_cannot_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "b", Path("/proc/nowhere/b")):
        with one_line(BundleError, "cannot be written", "choose another --out"):
            bundle_module.place_for(place)
    bundle_module.place_for(tmp_path / "new" / "folder" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "nothing is left of the try"


def test_an_extra_directory(root):
    (root / "cache").mkdir()
    with one_line(BundleError, "cache", "not in the manifest"):
        Bundle.load(root)


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
@pytest.mark.parametrize("kind", ["dangling", "circle", "directory", "fifo"])
def test_a_file_that_is_no_plain_file(tmp_path, root, name, kind):
    """Reading a pipe, say, would never end."""
    (root / name).rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(root / name)
    elif kind == "directory":
        (root / name).mkdir()
    else:
        (root / name).symlink_to(root / name if kind == "circle" else tmp_path / "nowhere")
    with one_line(BundleError, name):
        Bundle.load(root)


def linked(root, folder, kind):
    """A bundle whose files are links: as a hub's cache has them, or a Kubernetes volume."""
    place, real = folder / "linked", folder / "blobs"
    if kind == "volume":
        real = folder / "linked" / "..2026_11_26"
    shutil.copytree(root, real)
    place.mkdir(exist_ok=True)
    if kind == "volume":
        (place / "..data").symlink_to(real.name)
    for i, file in enumerate(sorted(real.iterdir())):
        if kind == "volume":
            (place / file.name).symlink_to(f"..data/{file.name}")
        else:
            file.rename(real / f"blob{i}")
            (place / file.name).symlink_to(f"../blobs/blob{i}")
    return place


@pytest.mark.parametrize("kind", ["hub", "volume"])
def test_a_bundle_of_links(tmp_path, root, kind):
    """What the links lead to is held against the manifest, and changes of it are seen."""
    place = linked(root, tmp_path, kind)
    assert Bundle.load(place).manifest == Bundle.load(root).manifest
    before = opening._identity(place)
    with opening._copy(place) as copied:
        assert Bundle.load(copied).manifest == Bundle.load(root).manifest
        assert not any(p.is_symlink() for p in copied.iterdir())
    assert opening._identity(place) != ()
    target = (place / "request.onnx").resolve()
    target.write_bytes(target.read_bytes()[:-1] + b"?")
    assert opening._identity(place) != before
    with one_line(BundleError, "request.onnx", "changed"):
        Bundle.load(place)


def test_a_volume_that_shows_another_version(tmp_path, root):
    """Kubernetes replaces `..data` in one step; every file is another one then."""
    place = linked(root, tmp_path, "volume")
    before = opening._identity(place)
    shutil.copytree(place / "..2026_11_26", place / "..2026_11_27")
    (place / "..data_tmp").symlink_to("..2026_11_27")
    (place / "..data_tmp").rename(place / "..data")
    assert opening._identity(place) != before
    Bundle.load(place)


@pytest.mark.parametrize("name", ["../elsewhere.onnx", "..", "..data", "/etc/hostname", "sub/x.onnx"])
def test_a_manifest_names_no_file_outside(tmp_path, root, name):
    manifest = Bundle.load(root).manifest
    (tmp_path / "elsewhere.onnx").write_bytes(b"x")
    files = {**manifest.files, name: {"sha256": sha256_of(tmp_path / "elsewhere.onnx"), "bytes": 1}}
    (root / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json())
    with one_line(BundleError, name):
        Bundle.load(root)


def test_a_hard_link_is_the_file(tmp_path, root):
    """Copies that share their blocks (`cp -l`) are bundles."""
    shutil.copytree(root, tmp_path / "C", copy_function=os.link)
    assert Bundle.load(tmp_path / "C").manifest == Bundle.load(root).manifest


def test_a_linked_bundle_directory(tmp_path, root):
    """`current → v3` is how people deploy."""
    (tmp_path / "current").symlink_to(root)
    assert Bundle.load(tmp_path / "current").manifest == Bundle.load(root).manifest


@pytest.mark.parametrize("path", ["none", "file", "a\0b", "x" * 300, ""])
def test_no_such_bundle(tmp_path, path):
    (tmp_path / "file").touch()
    with one_line(BundleError):
        Bundle.load(tmp_path / path)


# --- the manifest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**30, 0, -1, True, "1", 1.0, None, [], {}])
def test_other_versions(root, version):
    edit(root, lambda m: m.update(version=version))
    newer = type(version) is int and version > 1
    with one_line(BundleError, "version", *(("upgrade stca",) if newer else ())):
        Bundle.load(root)


def test_a_newer_version_is_named_even_when_nothing_else_is_understood():
    with one_line(BundleError, "version 99", "upgrade stca"):
        Manifest.from_json('{"format": "stca-bundle", "version": 99}')


@pytest.mark.parametrize(
    "name",
    ["../x", "../B/request.onnx", "/etc/hostname", "./request.onnx", "sub/x", "", ".", "..", "a\0b", "a\nb", "\ud800"],
)
def test_a_file_name_that_leads_elsewhere(tmp_path, root, name):
    (tmp_path / "x").write_bytes(b"x")
    (root / "sub").mkdir()
    (root / "sub" / "x").write_bytes(b"x")
    entry = {"sha256": sha256_of(tmp_path / "x"), "bytes": 1}
    edit(root, lambda m: m["files"].update({name: entry}))
    with one_line(BundleError):
        Bundle.load(root)


def test_a_graph_file_that_leads_elsewhere(tmp_path, root):
    (tmp_path / "x").write_bytes(b"x")
    for name in ("../x", str(tmp_path / "x"), MANIFEST, "nothing.onnx"):
        edit(root, lambda m, name=name: m["graphs"]["request"].update(file=name))
        with one_line(BundleError, repr(name)):
            Bundle.load(root)


def test_the_weights_version_is_their_digest(root):
    edit(root, lambda m: m.update(weights="0" * 64))
    with one_line(BundleError, "weights"):
        Bundle.load(root)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{}", '{"format": "zip"}', "[" * 100_000, "1" * 5000, "NaN", "\ufeff{}"],
    ids=lambda t: t[:10],
)
def test_what_is_no_manifest(root, text):
    (root / MANIFEST).write_text(text, encoding="utf-8")
    with one_line(BundleError, MANIFEST):
        Bundle.load(root)


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b"\x80"])
def test_a_manifest_that_is_no_text(root, data):
    (root / MANIFEST).write_bytes(data)
    with one_line(BundleError, MANIFEST):
        Bundle.load(root)


def paths(value, prefix=()):
    """Every place in a JSON value."""
    yield prefix
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*prefix, key))


GOLDEN = json.loads(manifest("00").to_json())
# The manifest's own digest is of its text, and `Bundle.load` holds it against that.
PLACES = sorted((p for p in paths(GOLDEN) if p and p != ("digest",)), key=str)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def put(place, value):
    raw = json.loads(json.dumps(GOLDEN))
    inner = raw
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(raw)


@settings(max_examples=300)
@given(st.sampled_from(PLACES), JSON)
def test_any_json_in_any_place(place, value):
    with nothing_or_one_line(BundleError):
        Manifest.from_json(put(place, value))


@pytest.mark.parametrize("place", [p for p in PLACES if isinstance(p[-1], str)], ids=lambda p: ".".join(map(str, p)))
def test_a_missing_field_is_named(place):
    """Fields of free-form records (model, split, parity, producer) may be missing; a spec's may not."""
    raw = json.loads(json.dumps(GOLDEN))
    inner = raw
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    optional = place[0] in ("model", "split", "parity", "producer") and len(place) > 1
    scoped = place[-1] == "scope" and place[:3] != ("graphs", "request", "inputs")
    if optional or scoped or place[-1] in ("limit", "input"):
        Manifest.from_json(json.dumps(raw))
    else:
        with one_line(BundleError, place[-1]):
            Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("appendable",), "no"),
        (("max_history",), "x"),
        (("max_history",), -3),
        (("attention",), [1]),
        (("graphs", "request", "inputs", 0, "name"), [1]),
        (("graphs", "request", "inputs", 0, "shape"), [-1]),
        (("graphs", "request", "inputs", 0, "scope"), "session"),
        (("graphs", "request", "inputs", 0, "limit"), "9"),
        (("state", 0, "name"), {}),
        (("state", 0, "bytes_per_token"), "16"),
        (("state", 0, "input"), [1]),
        (("graphs", "user_encoder", "inputs", 0, "name"), "nothing"),
    ],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else None,
)
def test_what_the_runtime_relies_on_is_checked_when_loading(place, value):
    """A manifest that loads is one that can be served from: no later TypeError or KeyError deep in a request."""
    with one_line(BundleError):
        Manifest.from_json(put(place, value))


# --- writing ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["notes.txt", "thesis", "old.onnx/notes.json", "weights.safetensors.bak"])
def test_a_bundle_with_someones_file_in_it_is_not_replaced(root, name):
    """The manifest alone does not make a directory ours to replace: what else lies there may be precious."""
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("precious")
    before = contents(root)
    with one_line(BundleError, str(root)):
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


def test_a_manifest_is_immutable(root):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bundle.load(root).manifest.weights = "x"


def test_a_place_inside_a_bundle_is_none(bundle_dir: Path) -> None:
    """A bundle there would be a file that the outer one does not know."""
    with one_line(BundleError, "lies inside the bundle", "--out"), writing(bundle_dir / "sub"):
        pytest.fail("was let in")


def test_an_engine_whose_file_is_not_there(bundle_dir: Path, tmp_path: Path) -> None:
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    seal(
        root,
        dataclasses.replace(Bundle.load(root).manifest, engines=(EngineEntry.of({**ENGINE, "file": "gone.plan"}),)),
    )
    with one_line(BundleError, "'gone.plan'", "build the engine again"):
        Bundle.load(root)


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


# --- engines ----------------------------------------------------------------------------------------------------------

ENGINE = {
    "graph": "user_encoder", "file": "user_encoder.plan", "flavour": "tensorrt", "precision": "fp16", "version": "11",
    "sm": 89, "requests": 1, "profiles": [{"N_h": [1, 8, 8]}], "padded": ["N_h"], "refit": "none",
    "inputs": [{"name": "x", "dtype": "int64", "shape": ["N_h"]}], "memory": {"weights": 8}, "seconds": 1.5,
}  # fmt: skip


def with_engine(**change: object) -> str:
    raw = json.loads(json.dumps(GOLDEN))
    raw["engines"] = [{n: x for n, x in {**ENGINE, **change}.items() if x != "left out"}]
    return json.dumps(raw)


def test_an_engine_is_read_and_written_as_it_is():
    made = Manifest.from_json(with_engine())
    assert made.engines[0] == EngineEntry.of(ENGINE)
    assert made.engines[0].profiles == ({"N_h": (1, 8, 8)},)
    assert Manifest.from_json(made.to_json()) == made


def test_an_engine_of_an_earlier_release_is_read_by_todays_words():
    key = {"name": "user_encoder", "graph": "a" * 64, "attention": "fused", "sm": 89}
    entry = Manifest.from_json(with_engine(attention="fused", key=key, outputs=["state"])).engines[0]
    assert entry.lowering == "fused"
    assert entry.key == {"graph": "user_encoder", "graph_sha256": "a" * 64, "lowering": "fused", "sm": 89}
    assert entry.outputs == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, "left out") for name in ("graph", "file", "flavour", "precision")),
        ("graph", "request"),
        ("file", ["user_encoder.plan"]),
        ("sm", "89"),
        ("requests", "x"),
        ("requests", 0),
        ("profiles", "N_h"),
        ("profiles", [{"N_h": [1, 8]}]),
        ("profiles", [{"N_h": [9, 8, 8]}]),
        ("profiles", [{"N_h": "1-8"}]),
        ("inputs", ["x"]),
        ("inputs", [{"name": "x", "dtype": "int65", "shape": []}]),
        ("padded", ["N_t"]),
        ("memory", []),
        ("seconds", "1"),
        ("key", None),
        ("more", 1),
    ],
)
def test_a_malformed_engine_is_refused_when_loading(field, value):
    with one_line(BundleError, field):
        Manifest.from_json(with_engine(**{field: value}))


def test_no_engines_entry_that_is_no_object_loads():
    for value in (None, 3, "x", [1]):
        with one_line(BundleError, "engine"):
            Manifest.from_json(json.dumps({**GOLDEN, "engines": [value]}))
