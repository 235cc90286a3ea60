from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stca.errors import StcaError
from stca.examples.train import __main__ as cli
from stca.examples.train.log import Log
from stca.examples.train.sampler import LengthSampler
from stca.examples.train.train import TrainOptions, attend_to_alike, fit, model_config, score_with, tensors
from stca.examples.train.world import GeneratedLog, World, WorldConfig, generate
from stca.export.reference.checkpoint import load_checkpoint
from stca.export.reference.module import Stca
from stca.trace import Trace

OPTIONS = TrainOptions(steps=20, requests=8, targets=32, lengths=LengthSampler(shortest=16, longest=128))


@pytest.fixture(scope="module")
def made() -> GeneratedLog:
    return generate(World(WorldConfig(topics=8, items=64, page=32)), users=40, history=256, targets=0, seed=1)


def fresh(made: GeneratedLog, seed: int = 0) -> Stca:
    torch.manual_seed(seed)
    model = Stca(model_config(made.log, width=32))
    attend_to_alike(model)
    return model


def test_twenty_steps_lower_the_loss(made: GeneratedLog) -> None:
    model = fresh(made)
    requests = made.log.training_requests(32, 128)
    inputs, labels = made.log.batch(requests, [128] * len(requests))

    @torch.no_grad()
    def loss() -> float:
        logits = model.logits(tensors(inputs))
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels)))

    before = loss()
    said: list[str] = []
    losses = fit(model, made.log, OPTIONS, least_history=128, progress=said.append)
    assert len(losses) == 20
    assert loss() < before - 0.03
    assert said[-1].startswith("step 20/20")


def test_training_is_reproducible(made: GeneratedLog) -> None:
    runs = [fit(fresh(made), made.log, OPTIONS, least_history=128, progress=lambda _: None) for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_loss_that_is_not_finite_stops_the_training(made: GeneratedLog) -> None:
    model = fresh(made)
    with torch.no_grad():
        model.item_table.fill_(float("nan"))
    with pytest.raises(StcaError, match=r"the loss is nan at step 1; lower --learning-rate"):
        fit(model, made.log, OPTIONS, least_history=128, progress=lambda _: None)


def test_a_fresh_target_attends_to_its_own_topic(made: GeneratedLog) -> None:
    """The first layer's attention on the target's own topic, at the start: far above that topic's share of events."""
    torch.manual_seed(0)
    plain = Stca(model_config(made.log, width=64))
    torch.manual_seed(0)
    alike = Stca(model_config(made.log, width=64))
    attend_to_alike(alike)
    request = made.log.training_requests(32, 128)[0]
    inputs, _ = made.log.batch([request], [128])
    same = torch.from_numpy(inputs["target_category"][:, None] == inputs["history_category"][None]).float()

    def mass(model: Stca) -> float:
        attended: list[torch.Tensor] = []

        def spy(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            attended.append(out)

        layer = model.layers[0]
        hooks = [layer.query.register_forward_hook(spy), layer.key.register_forward_hook(spy)]  # type: ignore[union-attr]
        with torch.no_grad():
            model(tensors(inputs))
        for hook in hooks:
            hook.remove()
        q, k = sorted((x.view(x.shape[0], 2, 32) for x in attended), key=len)
        weights = torch.softmax(torch.einsum("thd,lhd->thl", q, k) / 32**0.5, dim=-1)
        return float((weights * same[:, None]).sum(dim=-1).mean())

    share = float(same.mean())
    assert mass(plain) < 1.5 * share
    assert mass(alike) > 2 * share


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on a world and a log that take a second."""
    monkeypatch.setattr(cli, "World", lambda: World(WorldConfig(topics=8, items=64, page=32)))
    monkeypatch.setattr(cli, "TRAINING_USERS", 20)
    monkeypatch.setattr(cli, "TRAINING_REQUESTS_EACH", 4)


COMMON = [
    "--steps",
    "3",
    "--requests",
    "2",
    "--targets",
    "32",
    "--shortest",
    "16",
    "--longest",
    "64",
    "--threads",
    "1",
    "--json",
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("time", ["log", "delta"])
def test_command_writes_a_checkpoint_with_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], time: str
) -> None:
    out = tmp_path / "model.safetensors"
    argv = [*COMMON, "--time", time, "--eval-users", "6", "--eval-targets", "40", "--eval-history", "32,256"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "step 3/3" in captured.err
    assert result["checkpoint"] == str(out)
    assert [(r["history"], r["task"]) for r in result["auc"]] == [(n, t) for n in (32, 256) for t in ("finish", "like")]
    checkpoint = load_checkpoint(out)
    assert checkpoint.config.time == time
    assert json.loads(checkpoint.metadata["stca.auc"]) == result["auc"]
    training = json.loads(checkpoint.metadata["stca.training"])
    assert training["command"].startswith("python -m stca.examples.train --steps 3")
    assert training["seed"] == 0
    model = checkpoint.build()
    made = generate(World(WorldConfig(topics=8, items=64, page=32)), users=1, history=32, targets=5, seed=9)
    inputs, _ = made.log.batch(made.log.held_out_requests(), [32], request_time=time == "delta")
    assert np.isfinite(score_with(model)(inputs)).all()


@pytest.mark.usefixtures("small")
def test_generated_targets_share_one_device_whatever_the_longest_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(model: Stca, log: Log, options: TrainOptions, *, least_history: int, progress: object) -> list[float]:
        for r in log.training_requests(options.targets, least_history):
            seen.append(r.end - r.cut)
            assert len(np.unique(log.request_fields["device"][r.cut : r.end])) == 1
        return [0.0]

    monkeypatch.setattr(cli, "fit", look)
    argv = [*COMMON, "--longest", "72", "--eval-users", "2", "--eval-targets", "8", "--eval-history", "8"]
    assert cli.main([*argv, "--out", str(tmp_path / "model.safetensors")]) == 0
    assert seen == [32] * 20 * 4


def test_command_trains_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    lines = [f"u{rng.integers(4)}\ti{rng.integers(9)}\t{t}\t{rng.integers(1, 6)}" for t in range(600)]
    file = tmp_path / "log.tsv"
    file.write_text("user\titem\ttimestamp\taction\n" + "\n".join(lines))
    out = tmp_path / "model.safetensors"
    argv = [*COMMON, "--log", str(file), "--task", "like=4,5", "--eval-history", "16,64", "--out", str(out)]
    assert cli.main([*argv, "--trace", str(tmp_path / "trace")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["history"] for r in result["auc"]] == [16, 64]
    assert set(result["auc"][0]) == {"history", "task", "auc", "popularity", "item_rate", "item_and_user_rate"}
    assert load_checkpoint(out).config.tasks == ("like",)
    traced = list(Trace(tmp_path / "trace"))
    assert [t.user for t in traced] == [0, 1, 2, 3]
    held_out = [len(t.inputs["target_item"]) for t in traced]
    assert sum(held_out) == pytest.approx(0.2 * 600, abs=4)
    assert [t.labels.shape for t in traced if t.labels is not None] == [(n, 1) for n in held_out]
    assert {len(t.inputs["history_item"]) for t in traced} == {64}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "no/such/place.safetensors"], "there is no directory no/such; make it first"),
        (["--out", "."], "is a directory; name a file in it"),
        (["--out", "x.safetensors", "--targets", "48"], "a generated request has 32, on one device; take a divisor"),
        (["--out", "x.safetensors", "--targets", "32", "--heads", "3"], "not a multiple of heads 3"),
        (["--out", "x.safetensors", "--shortest", "20"], "multiple of 8"),
        (["--out", "x.safetensors", "--log", "none.csv"], "none.csv: cannot be read"),
        (["--out", "x.safetensors", "--log", "none.csv", "--trace", "."], "is there already; name a new folder"),
        (["--out", "x.safetensors", "--trace", "trace"], "`stca calibrate --trace demo` has the generated one's"),
    ],
)
def test_command_says_what_is_wrong_in_its_last_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_command_says_before_training_that_nothing_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "log.csv", tmp_path / "model.safetensors"
    file.write_text("user,item,timestamp,label\n" + "".join(f"u,i,{t},{t % 2}\n" for t in range(99)))
    assert cli.main([*COMMON, "--log", str(file), "--held-out", "0.01", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "--held-out 0.01" in lines[0]
    assert "raise it" in lines[0]


def test_what_nobody_foresaw_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr(cli, "read_log", broken)
    argv = ["--log", "any.csv", "--out", str(tmp_path / "model.safetensors")]
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "unexpected KeyError" in lines[0]
    with pytest.raises(KeyError):
        cli.main([*argv, "--debug"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--out", "x", "--steps", "0"],
        ["--out", "x", "--task", "like"],
        ["--out", "x", "--seed", "-1"],
        ["--out", "x", "--learning-rate", "fast"],
        ["--out", "x", "--held-out", "1"],
    ],
)
def test_bad_usage_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
