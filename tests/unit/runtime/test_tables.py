"""Rows of tables beside the graphs: looked up, checked block by block, or asked of the caller's own source."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tables
from support.errors import one_line

from stca import tables as table_files
from stca.bundle import Bundle, seal
from stca.errors import BundleError, EngineError, RequestError, UsageError
from stca.manifest import MANIFEST, Manifest
from stca.runtime import Request, RowSource, Session, Static
from stca.specs import TableSpec
from stca.tables import TableFile, row_numbers, write_table

REQUEST = Request({"hist": [1, 4999, 300], "item": [5, 0]})


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tables.split(tables.model(), tmp_path_factory.mktemp("tables"))


@pytest.fixture
def bundle(shipped: Bundle, tmp_path: Path) -> Bundle:
    """A copy to be written to."""
    return Bundle.load(shutil.copytree(shipped.path, tmp_path / "bundle"))


@pytest.fixture
def huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table is small enough to be checked at load, and blocks are small."""
    monkeypatch.setattr(table_files, "CHECKED_AT_LOAD", 0)


def written(folder: Path, rows: np.ndarray[Any, Any], dtype: str = "float32") -> TableSpec:
    return write_table(folder, "t", "items", *rows.shape, dtype, lambda begin, end: rows[begin:end])


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_what_was_written(tmp_path, monkeypatch, huge, count, dtype):
    import ml_dtypes

    monkeypatch.setattr(table_files, "BLOCK_BYTES", 1 << 16)
    kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    rows = np.random.default_rng(0).standard_normal((count, 16)).astype(kind)
    rows[: count // 2] = 0  # whole blocks of zeros among them
    spec = written(tmp_path, rows, dtype)
    assert (tmp_path / spec.file).read_bytes() == rows.tobytes()
    ids = np.random.default_rng(1).integers(0, count, 300)
    found = TableFile(tmp_path, spec).rows(ids)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rows[ids].astype(np.float32))
    TableFile(tmp_path, spec).check()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_rows_of_8_bits_are_their_numbers_times_their_scale(tmp_path, dtype):
    import ml_dtypes

    rng = np.random.default_rng(0)
    bytes_ = np.tile(np.arange(256, dtype=np.uint8), (300, 1))
    numbers = bytes_.view(getattr(ml_dtypes, dtype, None) or np.dtype(dtype)).astype(np.float32)
    scales = rng.standard_normal((300, 1)).astype(np.float32)
    rows = np.concatenate([bytes_, scales.view(np.uint8)], axis=1)
    spec = write_table(tmp_path, "t", "items", 300, 256, dtype, lambda begin, end: rows[begin:end])
    assert spec.row_bytes == 260
    assert (tmp_path / spec.file).stat().st_size == spec.bytes == 300 * 260
    ids = rng.integers(0, 300, 1000)
    found = TableFile(tmp_path, spec).rows(ids)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (numbers * scales)[ids])
    TableFile(tmp_path, spec).check()
    assert TableFile(tmp_path, spec).rows(np.zeros(0, np.int64)).shape == (0, 256)


def test_negative_ids_count_from_the_end_and_others_are_refused():
    spec = TableSpec("items", "t.rows", "t.digests", "float32", 10, 4, 1)
    np.testing.assert_array_equal(row_numbers(spec, np.array([[-1, 0], [9, -10]], np.int32)), [9, 0, 9, 0])
    for wrong in (10, -11, 1 << 40):
        with one_line(RequestError, "'items'", f"row {wrong}", "[-10, 9]"):
            row_numbers(spec, np.array([0, wrong]))


def test_a_small_table_that_was_changed_is_refused_at_load(bundle):
    flip(bundle.path / "table_0.rows", 300_000)
    with one_line(BundleError, "table_0.rows was changed", "block 0", "'table'", "copy it again"):
        Session.load(bundle.path)


def test_a_huge_table_that_was_changed_is_refused_at_first_use(bundle, monkeypatch, huge):
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 1 << 16)  # of 1024 rows
    (old,) = bundle.manifest.tables
    rows = tables.table()
    spec = write_table(bundle.path, "table_0", old.name, *rows.shape, old.dtype, lambda begin, end: rows[begin:end])
    seal(bundle.path, dataclasses.replace(bundle.manifest, tables=(spec,)))
    flip(bundle.path / spec.file, 2000 * 64)
    session = Session.load(bundle.path)
    wanted = tables.expected(tables.model(), [1, 4999, 300], [5, 0])
    np.testing.assert_allclose(session.score(REQUEST), wanted, rtol=1e-4, atol=1e-5)
    for _ in range(2):  # it stays refused
        with one_line(BundleError, "table_0.rows", "block 1 of table 'table'", "rows 1024 to 2047", "copy it again"):
            session.score(Request({"hist": [1030], "item": [5]}))
    np.testing.assert_allclose(session.score(REQUEST), wanted, rtol=1e-4, atol=1e-5)


def test_a_block_is_checked_once(tmp_path, monkeypatch, huge):
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 1 << 12)
    spec = written(tmp_path, tables.table())
    table, checked = TableFile(tmp_path, spec), []
    was = table.check_block
    monkeypatch.setattr(table, "check_block", lambda block: (checked.append(block), was(block)))
    for _ in range(2):
        table.rows(np.array([0, 63, 64, 4999]))
    assert checked == [0, 1, spec.blocks - 1]


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "a folder", "digests changed"])
def test_files_of_another_size_are_refused_before_they_are_mapped(bundle, change):
    """A file that ends before the map does would end the process at the first row beyond."""
    file = bundle.path / "table_0.rows"
    if change == "digests changed":
        flip(bundle.path / "table_0.digests", 0)
    elif change in ("missing", "a folder"):
        file.unlink()
        if change == "a folder":
            file.mkdir()
    else:
        file.write_bytes(file.read_bytes()[:-64] if change == "shorter" else file.read_bytes() + b"x")
    with one_line(BundleError, "table_0.digests" if change == "digests changed" else "table_0.rows", "copy"):
        Session.load(bundle.path)


@pytest.mark.parametrize("huge_table", [True, False])
def test_a_file_that_is_cut_short_while_it_is_served_is_refused(bundle, monkeypatch, huge_table):
    """Without a look at its size the system would end the process."""
    if huge_table:
        monkeypatch.setattr(table_files, "CHECKED_AT_LOAD", 0)
    session = Session.load(bundle.path)
    wanted = session.score(REQUEST)
    (spec,) = bundle.manifest.tables or ()
    whole = (bundle.path / spec.file).read_bytes()
    os.truncate(bundle.path / spec.file, 4096)
    words = f"{spec.file} has 4096 bytes, table '{spec.name}' needs {spec.bytes}; copy it again"
    with pytest.raises(BundleError, match=words):
        session.score(REQUEST)
    (bundle.path / spec.file).write_bytes(whole)
    np.testing.assert_array_equal(session.score(REQUEST), wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["tables"][0].update(rows=0), ("[0, 16]",)),
        (lambda m: m["tables"][0].update(rows=1 << 50), ("table",)),
        (lambda m: m["tables"][0].update(block_rows=3), ("power of two",)),
        (lambda m: m["tables"][0].update(dtype="float64"), ("float64",)),
        (lambda m: m["tables"][0].update(file="../x.rows"), ("no name of a file",)),
        (lambda m: m["tables"].append(m["tables"][0]), ("one name",)),
        (lambda m: m["tables"][0].update(name="other"), ("'table'", "does not have")),
        (lambda m: m["graphs"]["request"]["lookups"][0].update(ids="nobody"), ("'nobody'", "no input")),
        (lambda m: m["graphs"]["request"]["lookups"][0].update(rows="hist"), ("name of an input",)),
        (lambda m: m.update(tables=None), ("does not have",)),
    ],
)
def test_a_manifest_must_make_sense(bundle, change, words):
    raw = json.loads((bundle.path / MANIFEST).read_text())
    change(raw)
    with one_line(BundleError, *words):
        Manifest.from_json(json.dumps(raw))


def test_the_weights_version_names_the_tables_too(bundle):
    raw = json.loads((bundle.path / MANIFEST).read_text())
    assert raw["version"] == 2
    assert bundle.manifest.weights != raw["files"]["weights.safetensors"]["sha256"]
    spec, file = bundle.manifest.tables[0], bundle.path / "table_0.rows"
    rows = tables.table(seed=3)
    write_table(bundle.path, "table_0", spec.name, *rows.shape, spec.dtype, lambda begin, end: rows[begin:end])
    assert file.read_bytes() == rows.tobytes()
    assert seal(bundle.path, bundle.manifest).manifest.weights != bundle.manifest.weights


def test_rows_are_kept_beside_states(bundle):
    """The pool shares its bytes with the table's rows, before a swap and after."""
    plain = Session.load(bundle.path).score(REQUEST)
    with Session.load(bundle.path, cache_bytes=1 << 20, split=Static(0.25)) as session:
        for _ in range(2):
            assert session.memory() == {"states": 3 << 18, "table": 1 << 18}
            for _ in range(2):
                np.testing.assert_array_equal(session.score(REQUEST), plain)
            (kept,) = session._model.row_caches.values()
            assert min(kept.counts) > 0
            session.swap(bundle.path)


@pytest.mark.parametrize("cache_bytes", [0, 1, 128 * 16])
def test_a_budget_too_small_for_a_row_is_for_states(bundle, cache_bytes):
    """Nothing is kept of the table, and none of the bytes are kept for it."""
    plain = Session.load(bundle.path).score(REQUEST)
    with Session.load(bundle.path, cache_bytes=cache_bytes, split=Static(0.25)) as session:
        np.testing.assert_array_equal(session.score(REQUEST), plain)
        assert set(session.memory()) == {"states"}
        assert not session._model.row_caches


class Server:
    """A parameter server of the caller's."""

    def __init__(self, rows: Any) -> None:
        self.table, self.asked = rows, []

    def rows(self, ids: Any) -> Any:
        self.asked.append(ids.tolist())
        return self.table[ids] if isinstance(self.table, np.ndarray) else self.table(ids)


def test_the_callers_own_source_is_asked(bundle):
    server = Server(tables.table(seed=7))
    assert isinstance(server, RowSource)
    session = Session.load(bundle.path, tables={"table": server})
    wanted = tables.expected(tables.model(values=server.table), [1, 4999, 300], [5, 0])
    np.testing.assert_allclose(session.score(REQUEST), wanted, rtol=1e-4, atol=1e-5)
    assert server.asked == [[1, 4999, 300], [5, 0]]
    session.swap(bundle.path)
    np.testing.assert_allclose(session.score(REQUEST), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda ids: np.zeros((len(ids), 15)), ("shape [3, 15]", "expected [3, 16]")),
        (lambda ids: np.zeros(16), ("shape [16]",)),
        (lambda ids: "rows", ("ValueError",)),
        (lambda ids: 1 / 0, ("ZeroDivisionError",)),
    ],
)
def test_a_source_that_gives_something_else_is_named(bundle, source, words):
    session = Session.load(bundle.path, tables={"table": Server(source)})
    with one_line(EngineError, "table 'table'", "its source", *words):
        session.score(REQUEST)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"other": Server(0)}, ("no table 'other'", "it has table")),
        ({"table": object()}, ("rows(ids)",)),
        ([1], ("rows(ids)",)),
    ],
)
def test_sources_that_cannot_be_are_refused_at_load(bundle, given, words):
    with one_line(UsageError, "tables", *words):
        Session.load(bundle.path, tables=given)


def test_a_copied_or_linked_bundle_and_a_signature_cover_the_table(bundle, tmp_path):
    (tmp_path / "linked").mkdir()
    for file in bundle.path.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    found = Session.load(tmp_path / "linked").score(REQUEST)
    np.testing.assert_array_equal(found, Session.load(bundle.path).score(REQUEST))
