"""What a manifest says: its text is fixed, and what is wrong in it is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.bundles import edit, manifest
from support.errors import nothing_or_one_line, one_line

from stca.account import check_account
from stca.bundle import Bundle, seal, sha256_of
from stca.errors import BundleError
from stca.manifest import FORMAT_VERSION, MANIFEST, EngineEntry, Manifest

GOLDEN_FILES = Path(__file__).parents[1] / "golden"


def test_the_manifests_text_is_fixed():
    """Golden bytes: whoever changes them changes the format, and has a version to raise and old files to read."""
    text = manifest("00").to_json()
    assert text == (GOLDEN_FILES / "manifest-v1.json").read_text(encoding="utf-8")
    assert Manifest.from_json(text) == manifest("00")
    assert Manifest.from_json(text).to_json() == text


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


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        ("rules", [{"rule": "sum of products", "node": "x", "why": 3}], "why"),
        ("rules", [{"node": "x", "why": None}], "rule"),
        ("tables", [{"table": "t", "why": "too small"}], "bytes"),
    ],
)
def test_what_inspect_prints_of_a_cut_is_checked(entry, value, named):
    cut = dict.fromkeys(
        ("state_bytes", "bytes_per_token", "user_work", "recomputed_work", "request_work", "target_work"), 0
    )
    told = json.loads(put(("split",), {**cut, "workload": {}, "notes": [], "request_dependencies": []}))
    check_account(Manifest.from_json(json.dumps(told)))
    told["split"][entry] = value
    with one_line(BundleError, f"split: {entry}[0]: {named}"):
        check_account(Manifest.from_json(json.dumps(told)))


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


def test_a_manifest_is_immutable(root):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bundle.load(root).manifest.weights = "x"


def test_an_engine_whose_file_is_not_there(bundle_dir: Path, tmp_path: Path) -> None:
    root = shutil.copytree(bundle_dir, tmp_path / "B")
    seal(
        root,
        dataclasses.replace(Bundle.load(root).manifest, engines=(EngineEntry.of({**ENGINE, "file": "gone.plan"}),)),
    )
    with one_line(BundleError, "'gone.plan'", "build the engine again"):
        Bundle.load(root)
