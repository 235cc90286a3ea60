"""The short form of the fuzzer of checkpoints, in this process, and that it sees what goes wrong."""

from __future__ import annotations

import checkpoints
import pytest
import torch


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
    """Cases that run in this process leave its memory alone."""
    monkeypatch.setattr(checkpoints.resource, "setrlimit", lambda *_: None)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of odd pickles
def test_the_short_form(monkeypatch):
    """One is exported with its proof; the others are loaded and made a module alone, where most end."""
    assert checkpoints.look("0").kind == "served"

    def loaded(case, file, _):
        checkpoints.load_checkpoint(file).build("projected")
        return checkpoints.Outcome(case, "served")

    monkeypatch.setattr(checkpoints, "_exported", loaded)
    found = [checkpoints.look(str(n)) for n in range(1001, 1080)]
    assert not [o for o in found if o.kind not in ("served", "refused")]
    assert sum(o.kind == "refused" for o in found) > 50


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickle_that_runs_is_seen(monkeypatch, tmp_path):
    case = next(str(n) for n in range(1, 200) if pickled(n, tmp_path))
    assert checkpoints.look(case).kind == "refused"
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda file: torch.load(file, weights_only=False))
    assert checkpoints.look(case).said == checkpoints.RAN


def pickled(number, folder):
    """Whether a case is one of a hostile object that PyTorch wrote."""
    file = checkpoints._written(checkpoints.random.Random(f"checkpoint {number}"), number, folder, folder / "mark")
    return file.suffix == ".pt" and b"pathlib" in file.read_bytes()


def test_an_error_that_is_not_ours_is_seen(monkeypatch):
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda _: {}["x"])
    assert checkpoints.look("0").kind == "unexpected"
