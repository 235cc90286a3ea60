"""What `stca doctor` tells of a machine, and what becomes of its proofs: run, failed, or not run and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stca import commands
from stca.checks import unproven
from stca.checks.unproven import PROOFS, Proof, prove
from stca.commands import doctor
from stca.commands.doctor import Fact, judge, needs


def without_gpu(facts: list[Fact]) -> list[Fact]:
    return [Fact(f.name, None, "no GPU") if f.name in ("gpu", "torch-cuda") else f for f in facts]


def test_it_tells_what_works_and_what_to_do_for_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {fact["name"]: fact for fact in said["found"]}
    assert found["onnxruntime"]["found"]
    assert all(fact["found"] or fact["todo"] for fact in said["found"])
    for ability in said["works"]:
        assert ability["works"] == (not ability["missing"])
        assert ability["works"] or ability["todo"]
        assert all(found[name]["found"] is None for name in ability["missing"])
    assert {a["name"]: a["works"] for a in said["works"]}["serve and bench on a CPU"]


def test_a_missing_library_is_named_with_its_remedy() -> None:
    facts, _ = doctor.look()
    facts = [Fact(f.name, None, "get triton") if f.name == "triton" else f for f in facts]
    judged = {ability.name: ability for ability in judge(facts)}
    kernels = judged["compile the kernels ahead of time"]
    assert not kernels.works
    assert "get triton" in kernels.todo


def test_bindings_without_their_library_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LIBRARIES", {"tensorrt": ("no_such_package", "no_such_library")})
    assert "libno_such_library.so is not" in str(doctor._library_of("tensorrt"))
    assert doctor._library_of("onnxruntime") is None


def test_without_a_gpu_every_proof_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, _ = doctor.look()
    monkeypatch.setattr(doctor, "look", lambda: (without_gpu(facts), []))
    out = tmp_path / "proof.json"
    assert commands.main(["doctor", "--prove", "--out", str(out), "--json"]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed == written
    assert [(p["name"], p["status"]) for p in written["proofs"]] == [(p.name, "not run: no GPU") for p in PROOFS]
    assert commands.main(["doctor", "--out", str(out)]) == 2


def test_a_proof_passes_fails_or_hangs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unproven, "_bundle", lambda folder, checkpoint: "a bundle")
    proofs = [
        Proof("passes", (), (("platform",), ("platform",))),
        Proof("fails", (), (("no_such_module_of_ours", "{bundle}"), ("platform",))),
        Proof("hangs", (), (("http.server", "0"),)),
        Proof("passes too", ("gpu",), (("platform",),)),
        Proof("is not run", ("tensorrt",), (("platform",),)),
    ]
    ended = prove({"gpu": None, "tensorrt": "install it"}, tmp_path, tmp_path, proofs=proofs, limit=3)
    statuses = {proof["name"]: proof["status"] for proof in ended}
    assert statuses["passes"] == statuses["passes too"] == "passed"
    assert statuses["fails"].startswith("failed: no_such_module_of_ours {bundle} ended with exit status 1")
    assert "none within 3 s" in statuses["hangs"]
    assert statuses["is not run"] == "not run: install it"
    assert ended[1]["steps"][0]["command"] == ["no_such_module_of_ours", "a bundle"]
    assert len(ended[1]["steps"]) == 1
    assert "No module named" in ended[1]["steps"][0]["said"]


def test_every_need_is_a_fact_that_is_looked_at_and_every_step_is_a_command_that_exists() -> None:
    facts, _ = doctor.look()
    here = needs(facts)
    for proof in PROOFS:
        assert set(proof.needs) <= here.keys()
        for module, *words in proof.steps:
            if module == "stca":
                places = {"{bundle}": "B", "{checkpoint}": "C"}
                commands.parser().parse_args([places.get(w, w) for w in words])
            else:
                assert callable(getattr(unproven, words[0]))
