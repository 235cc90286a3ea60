"""A sketch reads the whole history, the model without one its recent events alone; both are trained and told apart."""

from __future__ import annotations

import json

import pytest
import torch

from stca.bundle import Bundle
from stca.examples.train import sketch
from stca.examples.train.sketch import Sketched, with_recent
from stca.examples.train.world import World, generate

RECENT, HISTORY = 16, 192


@pytest.fixture(scope="module")
def log():
    return generate(World(), users=2, history=HISTORY, targets=64, seed=3).log


def scores(model, log, **changed):
    inputs, _ = log.batch(log.held_out_requests()[:1], [HISTORY])
    inputs = with_recent(inputs | changed, RECENT)
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    with torch.no_grad():
        return model(tensors)


@pytest.mark.parametrize("with_sketch", [True, False])
def test_who_reads_the_oldest_events(log, with_sketch):
    torch.manual_seed(0)
    model = Sketched(log, with_sketch)
    actions = log.batch(log.held_out_requests()[:1], [HISTORY])[0]["history_action"]
    older, newer = actions.copy(), actions.copy()
    older[: HISTORY // 2], newer[-RECENT:] = 2 - older[: HISTORY // 2], 2 - newer[-RECENT:]
    before = scores(model, log)
    assert before.shape == (64, 2)
    assert torch.equal(before, scores(model, log, history_action=older)) != with_sketch
    assert not torch.equal(before, scores(model, log, history_action=newer))


def test_a_sketch_is_that_of_its_parts_added(log):
    """But for the division by the shares, which are added too."""
    model = Sketched(log, sketch=True)
    topics = torch.nn.functional.normalize(torch.randn(30, 32), dim=-1)
    tokens = torch.cat([topics, torch.randn(30, 32)], dim=-1)

    def sums(rows):
        shares = (16.0 * topics[rows] @ torch.nn.functional.normalize(model.prototypes, dim=-1).T).softmax(dim=-1)
        return model.slots(tokens[rows]) * (shares.sum(dim=0)[:, None] + 1.0)

    torch.testing.assert_close(sums(slice(0, 30)), sums(slice(0, 10)) + sums(slice(10, 30)))


def test_the_command_trains_both_and_serves_the_second(capsys, tmp_path):
    argv = ["--steps", "2", "--users", "2", "--history", "128", "--recent", "64", "--eval-users", "2", "--json"]
    assert sketch.main([*argv, "--bundle", str(tmp_path / "bundle")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["recent events alone", "with a sketch", "with a sketch, served"]
    assert {(row["history"], row["task"]) for row in found["with a sketch"]} == {
        (n, task) for n in (64, 128) for task in ("finish", "like")
    }
    assert Bundle.load(tmp_path / "bundle").manifest.appendable
    for model, served in zip(found["with a sketch"], found["with a sketch, served"], strict=True):
        assert served["auc"] == pytest.approx(model["auc"], abs=1e-4)
