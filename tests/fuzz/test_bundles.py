"""The short form of the fuzzer of bundles, and that it sees what goes wrong."""

from __future__ import annotations

import bundles
import mutations
import outcomes
import pytest

from stca.bundle import Bundle


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
    """Cases that run in this process leave its memory alone."""
    monkeypatch.setattr(bundles.resource, "setrlimit", lambda *_: None)


@pytest.mark.parametrize("base", bundles.BASES, ids=lambda folder: folder.name)
def test_a_bundle_that_nothing_changed_is_right_and_served(base, tmp_path):
    mutations.write(tmp_path, *mutations.read(base))
    Bundle.load(tmp_path)
    with_engines = mutations.read(base)
    mutations.add_engines(*with_engines)
    mutations.write(tmp_path, *with_engines)
    assert len(Bundle.load(tmp_path).manifest.engines) == 2
    assert bundles.look(f"{base.name}/0").kind == "served"


def test_a_case_is_always_the_same():
    with bundles._made("log/8") as (one, *_), bundles._made("log/8") as (other, *_):
        assert mutations.read(one) == mutations.read(other)
        assert mutations.read(one) != mutations.read(bundles.BASES[1])


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (lambda y: y * 1.001, "wrong"),
        (lambda y: y[:1], "wrong"),
        (lambda y: y * float("nan"), "wrong"),
        (lambda y: {}["x"], "unexpected"),
    ],
)
def test_what_goes_wrong_is_seen(monkeypatch, wrong, kind):
    right = bundles.Session.score
    monkeypatch.setattr(bundles.Session, "score", lambda *args: wrong(right(*args)))
    assert bundles.look("log/0").kind == kind


def test_a_graph_that_the_engine_dies_of_is_told_apart(monkeypatch):
    """A `Sum` without one of its inputs ends ONNX Runtime 1.32, with a session or without."""
    kinds = {bundles.look: "died", bundles.alone: "died"}
    monkeypatch.setattr(outcomes, "outcomes", lambda asked, look, _: (outcomes.Outcome(c, kinds[look]) for c in asked))
    assert [o.kind for o in bundles.found(["log/1"])] == [outcomes.ENGINE]
    kinds[bundles.alone] = "served"
    assert [o.kind for o in bundles.found(["log/1"])] == ["died"]


def test_the_short_form(capsys):
    assert bundles.main(["--rounds", "60", "--first", "5000"]) == 0, capsys.readouterr().err
    assert int(capsys.readouterr().out.split(" served")[0].split()[-1]) >= 5
