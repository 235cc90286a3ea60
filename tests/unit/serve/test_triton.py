"""A bundle in Triton's model repository, run by a stand-in of Triton's python backend: Triton itself is not here.

The stand-in has what `model.py` uses of `triton_python_backend_utils`, and calls a model as Triton does.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from typing import Any

import numpy as np
import pytest
from support.errors import one_line

from stca import commands, probe
from stca.errors import BundleError, UsageError
from stca.runtime import Request, Session
from stca.serve.triton_repository import _tensor, write_repository
from stca.specs import TensorSpec


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._values


class TritonError:
    INTERNAL, INVALID_ARG, NOT_FOUND, CANCELLED, UNAVAILABLE = (
        "internal",
        "invalid",
        "not found",
        "cancelled",
        "unavailable",
    )

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.outputs, self.error = {t.name(): t.as_numpy() for t in output_tensors}, error


class Asked:
    def __init__(self, inputs: dict[str, Any], outputs: tuple[str, ...] = ("scores",), **parameters: Any) -> None:
        self._inputs, self._outputs, self._parameters = inputs, outputs, parameters

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, x) for name, x in self._inputs.items()]

    def requested_output_names(self) -> list[str]:
        return list(self._outputs)

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def request_id(self) -> str:
        return "7"


@pytest.fixture
def repository(bundle_dir, tmp_path, monkeypatch):
    stand_in = types.ModuleType("triton_python_backend_utils")
    for found in (Tensor, TritonError, InferenceResponse):
        setattr(stand_in, found.__name__, found)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.delitem(sys.modules, "stca.serve.triton_model", raising=False)
    write_repository(bundle_dir, tmp_path / "models", "ranker")
    yield tmp_path / "models"
    sys.modules.pop("stca.serve.triton_model", None)  # it is of this stand-in


def started(repository: Any, session: str | None = None) -> Any:
    """The model as Triton starts it."""
    model = repository / "ranker"
    spec = importlib.util.spec_from_file_location("model", model / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    config = {"name": "ranker", "parameters": {} if session is None else {"session": {"string_value": session}}}
    made.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(model),
            "model_name": "ranker",
            "model_version": "1",
        }
    )
    return made


@pytest.fixture(scope="module")
def session(bundle_dir):
    with Session.load(bundle_dir, threads=1) as made:
        yield made


@pytest.fixture
def asked(session):
    specs = session.manifest.graphs["request"].inputs
    made = probe.single(specs, 5, 3, np.random.default_rng(0))
    offsets = {s.name for s in specs if s.shape == ("B_plus_1",)}
    scopes = {s.name: s.scope for s in specs}
    whole = {n: x for n, x in made.items() if n not in offsets}
    return whole, {n: x for n, x in whole.items() if scopes[n] != "user"}


def test_the_repository_is_one_model_with_all_that_it_needs(repository, bundle_dir, session):
    assert [p.name for p in repository.iterdir()] == ["ranker"], "nothing is left of the writing"
    assert sorted(p.name for p in (repository / "ranker").iterdir()) == ["1", "README.md", "config.pbtxt"]
    Session.load(repository / "ranker" / "1" / "bundle").close()
    config = (repository / "ranker" / "config.pbtxt").read_text()
    graph = session.manifest.graphs["request"]
    told = dict(re.findall(r'input \[ \{ name: "(\w+)" .*?(optional: true)? \} \]', config))
    sent = [s for s in graph.inputs if s.shape != ("B_plus_1",)]
    assert told == {s.name: "optional: true" if s.scope == "user" else "" for s in sent}
    assert 'output [ { name: "scores" data_type: TYPE_FP32 dims: [ -1, 2 ] } ]' in config
    assert "count: 1 " in config, "each instance would keep states of its own"
    assert f"{repository}/ranker/1" in (repository / "ranker" / "README.md").read_text()
    number = _tensor(TensorSpec("hour", "int64", (), "request"))
    assert number == '{ name: "hour" data_type: TYPE_INT64 dims: [ 1 ] reshape: { shape: [ ] } }'
    for name in ('a" } ] parameters [ {', "a\\", "a\nb"):  # would be read as more than a name
        with one_line(UsageError, "no name for Triton's configuration"):
            _tensor(TensorSpec(name, "int64", (), "request"))


def test_it_scores_as_the_session_and_keeps_states(repository, asked, session):
    model, (whole, rest) = started(repository), asked
    expected = session.score(Request(whole))
    needed, scored, hit, bare = model.execute(
        [Asked(rest, user="ann", version=1), Asked(whole, user="ann", version=1), Asked(rest, user="ann", version=1),
         Asked(whole)]
    )  # fmt: skip
    assert needed.error.code == TritonError.INVALID_ARG
    assert needed.error.message.startswith("history_needed: ")
    for one in (scored, hit, bare):
        assert one.error is None
        np.testing.assert_array_equal(one.outputs["scores"], expected)
    model.finalize()
    (closed,) = model.execute([Asked(whole)])
    assert closed.error.code == TritonError.INTERNAL


def test_what_is_wrong_is_told_by_code_and_others_go_on(repository, asked):
    model, (whole, _) = started(repository), asked
    wrong = [
        Asked(whole, nonsense=1),
        Asked({**whole, "history_item": whole["history_item"] * 0 - 1}),
        Asked(whole, ("nothing",)),
        Asked(whole, deadline_ms=1e-6),
    ]
    *told, right = model.execute([*wrong, Asked(whole)])
    assert [t.error.message.partition(":")[0] for t in told] == ["bad_request"] * 3 + ["deadline"]
    assert [t.error.code for t in told] == [TritonError.INVALID_ARG] * 3 + [TritonError.CANCELLED]
    assert right.error is None


def test_what_nobody_foresaw_is_one_requests_own(repository, asked, monkeypatch):
    model, (whole, _) = started(repository), asked
    infer = model._served.infer

    def sometimes(asked: Any, call: Any) -> Any:
        if "note" in asked.parameters:
            raise ZeroDivisionError("of ann's")
        return infer(asked, call)

    monkeypatch.setattr(model._served, "infer", sometimes)
    failed, right = model.execute([Asked(whole, note=1), Asked(whole)])
    assert (failed.error.code, right.error) == (TritonError.INTERNAL, None)
    assert failed.error.message.startswith("internal: ")
    assert "ann" not in failed.error.message, "it may hold a client's values"


def test_options_of_the_session_are_the_configurations(repository, asked):
    whole, rest = asked
    model = started(repository, '{"cache_bytes": 0}')
    kept = model.execute([Asked(whole, user="ann", version=1), Asked(rest, user="ann", version=1)])[1]
    assert kept.error.message.startswith("history_needed: ")
    for text in ("{", "[1]", '{"nonsense": 1}', '{"cache_bytes": -1}'):
        with one_line(UsageError):
            started(repository, text)


def test_nothing_is_overwritten_and_no_damaged_bundle_handed_on(bundle_dir, tmp_path, capsys):
    models = str(tmp_path / "models")
    command = ["export", str(bundle_dir), "--triton-repository", models]
    assert commands.main([*command, "--json", "--name", "ranker"]) == 0
    assert json.loads(capsys.readouterr().out)["triton_model"] == f"{models}/ranker"
    with one_line(UsageError, "ranker"):
        write_repository(bundle_dir, models, "ranker")
    for name in ("", "../up", "a/b", ".hidden", "a\n"):
        with one_line(UsageError):
            write_repository(bundle_dir, models, name)
    with one_line(BundleError):
        write_repository(tmp_path, models, "other")
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["ranker"]
    with pytest.MonkeyPatch.context() as patch:  # before an export of minutes
        patch.setattr("stca.commands.export._exported", lambda _: pytest.fail("it exports first"))
        taken = ["export", "x.safetensors", "--out", "x", "--triton-repository", models, "--name", "ranker"]
        assert commands.main(taken) == 2
        assert "is there already" in capsys.readouterr().err
    for wrong in ([*command[:2]], [*command, "--out", "x"], ["export", "x.safetensors"], [*command[:2], "--name", "a"]):
        assert commands.main(wrong) == 2
        assert "Traceback" not in capsys.readouterr().err
