"""The fuzzer's short form, and that it would see each kind of fault."""

from __future__ import annotations

import json

import cases
import graphs
import node_tests
import numpy as np
import onnx
import onnxruntime
import pytest
from cases import Case, check
from onnx import TensorProto, helper
from outcomes import Outcome
from random_graphs import random_case
from workers import answers

# Of the node tests, what recommenders use and what is hard: loading all of them takes most of a minute.
FILES = (
    "gru",
    "topk",
    "where",
    "layernormalization",
    "gather",
    "einsum",
    "nonzero",
    "if_",
    "loop",
    "softmax",
    "cumsum",
)


@pytest.mark.parametrize("seed", range(0, 400, 5))
def test_a_random_graph_is_valid_and_always_the_same(seed):
    case, again = random_case(seed), random_case(seed)
    assert case.model == again.model
    onnx.checker.check_model(case.model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(case.model.SerializeToString(), options)
    (scores,) = session.run(None, {i.name: case.whole[i.name] for i in session.get_inputs()})
    assert len(scores) == len(case.request["item"])
    assert np.isfinite(scores).all()


def test_a_process_that_dies_or_hangs_is_counted():
    asked = ["1 + 1", "__import__('os')._exit(136)", "2 + 2", "__import__('time').sleep(60)", "3 + 3"]
    found = [a for _, a in answers(asked, eval, seconds=2)]
    assert [found[0], found[2], found[4]] == [2, 4, 6]
    assert [str(found[1]), str(found[3])] == ["exit code 136", "more than 2 s"]


@pytest.fixture
def product():
    """A user's number times each target's."""
    inputs = [
        helper.make_tensor_value_info(*i) for i in (("u", TensorProto.FLOAT, [1]), ("t", TensorProto.FLOAT, ["N_t"]))
    ]
    nodes = [helper.make_node("Exp", ["u"], ["e"]), helper.make_node("Mul", ["e", "t"], ["score"])]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N_t"])]
    model = helper.make_model(
        helper.make_graph(nodes, "product", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    feeds = {"u": np.float32([0.5]), "t": np.float32([1, 2, 3])}
    return Case("product", model, {"u": "user", "t": "target"}, feeds, feeds)


def test_a_model_is_served(product, tmp_path):
    assert check(product, tmp_path).kind == "served"


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y[::-1], lambda y: y[:1]])
def test_wrong_scores_are_seen(product, tmp_path, monkeypatch, wrong):
    right = cases.Session.score
    monkeypatch.setattr(cases, "prove", lambda *_: {})
    monkeypatch.setattr(cases.Session, "score", lambda *args: wrong(right(*args)))
    assert check(product, tmp_path).kind == "wrong"


def test_an_error_that_is_not_ours_is_seen(product, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("x")

    monkeypatch.setattr(cases, "prove", fail)
    assert check(product, tmp_path).kind == "unexpected"


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "found.jsonl", []
    monkeypatch.setattr(graphs, "found", lambda names: (asked.append(n) or Outcome(n, "served") for n in names))
    assert graphs.main(["--random", "2", "--nodes", "", "--out", str(file)]) == 0
    assert graphs.main(["--random", "3", "--nodes", "", "--out", str(file)]) == 0
    assert asked == ["random/0", "random/1", "random/2"]
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()] == asked
    assert "3 cases" in capsys.readouterr().out


def test_node_tests_come_in_every_style():
    found = [c for c in map(node_tests.node_case, node_tests.names(FILES)) if c]
    assert {frozenset(c.scopes.values()) for c in found} == {frozenset({"user", "target"})}
    assert {"fuzz_user", "fuzz_target"} <= {n for c in found for n in c.scopes}
    assert any(not n.startswith("fuzz") for c in found for n, scope in c.scopes.items() if scope == "target")


def test_the_short_form(capsys):
    """What recommenders are made of, and random ones: all served with parity or refused in one line."""
    few = ["--random", "8", "--nodes", "topk,gather,einsum,loop", "--every", "6"]
    assert graphs.main(few) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert int(said.split(" served")[0].split()[-1]) >= 5, said
