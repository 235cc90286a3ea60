"""The artifact on disk: whatever is wrong with it is refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.bundles import FILES, write
from support.errors import nothing_or_one_line, one_line

import stca.bundle as bundle_module
from stca import opening
from stca.bundle import Bundle, sha256_of, writing
from stca.errors import BuildError, BundleError
from stca.manifest import MANIFEST, WEIGHTS

GOLDEN_FILES = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that hypothesis may break, as long as each example mends it."""
    return write(tmp_path_factory.mktemp("scratch") / "B").path


def test_what_is_written_is_what_is_loaded(tmp_path):
    written = write(tmp_path / "B")
    loaded = Bundle.load(tmp_path / "B")
    assert loaded == written
    assert loaded.file("request").read_bytes() == b"whole"
    assert set(loaded.manifest.files) == set(FILES)
    assert os.listdir(tmp_path) == ["B"]
    assert Bundle.load(str(tmp_path / "B")) == loaded


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


@pytest.mark.parametrize("fails", [False, True], ids=["opens at last", "never opens"])
def test_what_was_opened_goes_when_its_last_holder_lets_go(root, fails):
    class Opened:
        pass

    alive = weakref.WeakSet()

    def use(found):
        made = Opened()
        alive.add(made)
        if len(turns) < 2:
            turns.append(touched(root))
            raise BuildError("replaced meanwhile")
        if fails:
            raise BuildError("the engine does not fit")
        return made

    turns = []
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(BuildError):
            opening.opened(root, use)
        assert not alive, "errors of earlier tries hold what they met"
    finally:
        gc.enable()


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


def test_a_place_inside_a_bundle_is_none(bundle_dir: Path) -> None:
    """A bundle there would be a file that the outer one does not know."""
    with one_line(BundleError, "lies inside the bundle", "--out"), writing(bundle_dir / "sub"):
        pytest.fail("was let in")
