"""`stca score` and `stca schema`: JSON in, the session's scores out, and schemas that say what is taken."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from stca import commands, probe
from stca.bundle import Bundle
from stca.json_schema import schema_of
from stca.runtime import Request, Session
from stca.runtime.json_request import requests_schema
from stca.specs import EventInput, Padding, TensorSpec

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def bundle(exported: Any) -> Path:
    return Path(exported("log", "projected"))


@pytest.fixture
def requests(bundle: Path) -> list[dict[str, Any]]:
    """A miss, then the same user without a history."""
    specs = Bundle.load(bundle).manifest.graphs["request"].inputs
    inputs = probe.single(specs, 5, 3, np.random.default_rng(0))
    whole = {n: x.tolist() for n, x in inputs.items()}
    rest = {s.name: whole[s.name] for s in specs if s.scope != "user" and s.name in whole}
    return [{"user": "ann", "version": 1, "inputs": whole}, {"user": "ann", "version": 1, "inputs": rest}]


def _json(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    assert commands.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_are_the_sessions(bundle, requests, tmp_path, capsys, monkeypatch):
    file = tmp_path / "requests.json"
    file.write_text(json.dumps(requests))
    said = _json(capsys, "score", bundle, file)
    expected = Session.load(bundle).score(Request(requests[0]["inputs"]))
    assert said["tasks"] == list(Session.load(bundle).tasks)
    for one in said["requests"]:
        assert one["user"] == "ann"
        np.testing.assert_array_equal(np.array(one["scores"], np.float32), expected)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(requests[0])))
    assert _json(capsys, "score", bundle, "-")["requests"] == said["requests"][:1]


def test_users_and_versions_are_those_that_the_session_takes(bundle, requests, tmp_path, capsys):
    file = tmp_path / "requests.json"
    for user, version in ((-5, 1 << 63), ("", -1)):
        file.write_text(json.dumps(requests[0] | {"user": user, "version": version}))
        assert _json(capsys, "score", bundle, file)["requests"][0]["user"] == user


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[1]", "request 0 is 1"),
        ('{"input": {}}', "misses 'inputs'"),
        ('{"inputs": {}, "usr": "a"}', "unknown field 'usr'"),
        ('{"inputs": {}, "user": [1]}', "request 0: user"),
        ('{"inputs": {"history_item": "x"}}', "request 0: "),
        ('{"inputs": {"nothing": [1]}}', "the model has no such input"),
    ],
)
def test_bad_requests_are_one_line(bundle, tmp_path, capsys, text, expected):
    file = tmp_path / "requests.json"
    file.write_text(text)
    assert commands.main(["score", str(bundle), str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert "unexpected" not in said.err


def test_good_requests_are_scored_beside_a_bad_one(bundle, requests, tmp_path, capsys):
    file = tmp_path / "requests.json"
    bad = {"user": "bob", "inputs": {"nothing": [1]}}
    file.write_text(json.dumps([requests[0], bad, requests[1]]))
    assert commands.main(["score", str(bundle), str(file), "--json"]) == 2
    said = capsys.readouterr()
    first, second, third = json.loads(said.out)["requests"]
    assert first["scores"] == third["scores"]
    assert "no such input" in second["error"]
    assert "scores" not in second
    (line,) = said.err.splitlines()
    assert line.startswith("stca: request 1: 'nothing'")
    assert commands.main(["score", str(bundle), str(file)]) == 2
    assert "request 2, target 0" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "missing.json"])
def test_a_file_that_cannot_be_read(bundle, tmp_path, capsys, place):
    assert commands.main(["score", str(bundle), str(tmp_path / place)]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest-v1.json", "bundle-v1/manifest.json"])
def test_the_schema_takes_manifests(name, capsys):
    schema = _json(capsys, "schema", "manifest")
    jsonschema.Draft202012Validator.check_schema(schema)
    manifest = json.loads((GOLDEN / name).read_text())
    jsonschema.validate(manifest, schema)
    for damaged in (
        {**manifest, "appendable": 1},
        {**manifest, "version": 99},
        {**manifest, "surprise": 1},
        {n: v for n, v in manifest.items() if n != "weights"},
        {**manifest, "graphs": {"request": {"file": "a.onnx", "inputs": []}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(damaged, schema)


def test_the_schema_takes_requests(bundle, requests, capsys):
    for argv in (["schema", "requests"], ["schema", "requests", "--bundle", bundle]):
        schema = _json(capsys, *argv)
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(requests, schema)
        jsonschema.validate(requests[0], schema)
        for damaged in ({"user": "ann"}, {**requests[0], "usr": 1}, {**requests[0], "user": 1.5}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(damaged, schema)
    inputs = requests[0]["inputs"]
    for name, value in (("history_item", [10**9]), ("history_item", "x"), ("nothing", [1])):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"inputs": {**inputs, name: value}}, schema)


def test_the_schema_of_padded_histories(bundle):
    """Events alone or with the axis of one, as many as there are; lengths and masks may be left out."""
    manifest = Bundle.load(bundle).manifest
    inputs = (
        TensorSpec("events", "int64", (1, 4), "user", limit=9),
        TensorSpec("mask", "bool", (1, 4), "request"),
        TensorSpec("length", "int64", (1,), "request", limit=5, low=1, length_of="L"),
        TensorSpec("shift", "int64", ("N_t",), "target", low=-3),
    )
    graph = dataclasses.replace(manifest.graphs["request"], inputs=inputs)
    padding = (Padding((EventInput("events", 1), EventInput("mask", 1, event=1)), "left", "length"),)
    padded = dataclasses.replace(manifest, graphs={**manifest.graphs, "request": graph}, padding=padding)
    schema = requests_schema(padded)
    for right in ({"events": [1, 2]}, {"events": [[1, 2, 3, 8]], "mask": [[True]], "length": [1]}, {}):
        jsonschema.validate({"inputs": {"shift": [-3], **right}}, schema)
    for wrong in ({"events": [1] * 5}, {"events": [9]}, {"length": [0]}, {"shift": [-4]}, {"mask": [1]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"inputs": {"shift": [0], **wrong}}, schema)
    for name, value in (("low", -5), ("low", "x")):
        manifest_schema = schema_of(TensorSpec, "a tensor")
        tensor = {"name": "a", "dtype": "int64", "shape": [1], "scope": None, "limit": None, name: value}
        if value == -5:
            jsonschema.validate(tensor, manifest_schema)
        else:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(tensor, manifest_schema)


def test_inspect_says_what_a_caller_needs(bundle, capsys):
    assert commands.main(["inspect", str(bundle)]) == 0
    said = capsys.readouterr().out
    m = Bundle.load(bundle).manifest
    limit = next(s.limit for s in m.graphs["request"].inputs if s.name == "history_item")
    assert f"ids below {limit}" in said
    assert f"at most {m.max_history} events" in said
    assert "outputs\n  scores" in said
    assert "parity: not checked at export" in said  # the fixture's bundle is made without
    assert "% of the work" in said
