"""The README's commands and examples, run as they are printed."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from stca import commands as cli
from stca.report.demo import shipped_checkpoint

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.M | re.S)
    return [textwrap.dedent(text) for _, text in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory with a bundle made by the README's own export command."""
    folder = tmp_path_factory.mktemp("readme")
    command = next(line for block in blocks("sh") for line in block.splitlines() if "stca export" in line)
    words = shlex.split(command)
    assert words[0].endswith("stca")
    assert words[2].endswith(shipped_checkpoint().name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["export", str(shipped_checkpoint()), *words[3:]]) == 0
    return folder


def test_every_command_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    used = set(re.findall(r"stca (export|split|verify|bench|inspect|build|refit|\w+ bundle)", README))
    for command in {words.split()[0] for words in used}:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
    assert "usage: stca" in capsys.readouterr().out


def test_the_five_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks("python") if "Session.load" in block)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    scores = names["scores"]
    assert isinstance(scores, np.ndarray)
    assert scores.shape == (3, 2)
    assert np.isfinite(scores).all()


def test_the_server(folder: Path) -> None:
    """The request of curl is a miss without a history, and a hit once Triton's client has brought it."""
    pytest.importorskip("tritonclient.grpc")
    from support.serving import running

    code = next(block for block in blocks("python") if "tritonclient" in block)
    history = next(block for block in blocks("python") if "Session.load" in block)
    request = next(block for block in blocks("sh") if "/infer" in block).split("-d '")[1].split("'")[0].encode()
    names: dict[str, object] = {}
    exec(re.sub(r"(?ms)^from.*?checks every file's digest$|^scores = .*", "", history), names)
    with running(folder / "bundle") as server:
        assert server.http("/v2/models/ranker/infer", request)[0] == 409
        exec(code.replace("localhost:8001", f"127.0.0.1:{server.ports['grpc']}"), names)
        status, _, told = server.http("/v2/models/ranker/infer", request)
    assert (status, told["parameters"]["hit"]) == (200, True)
    np.testing.assert_allclose(np.reshape(told["outputs"][0]["data"], (3, 2)), names["scores"], 1e-6)


def test_ones_own_module(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class MyModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.devices = torch.nn.Parameter(torch.randn(3, 64))

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            user = torch.tanh(inputs["events"]).sum(0) * 0.01 + self.devices[inputs["device"]][0]
            return torch.sigmoid(inputs["items"] @ user.unsqueeze(1) * 0.01)

    torch.manual_seed(0)
    monkeypatch.setattr("builtins.MyModule", MyModule, raising=False)
    monkeypatch.chdir(folder)
    (folder / "my_model.py").write_text(next(block for block in blocks("python") if "RequestModel" in block))
    code = cli.main(["export", "--model", "my_model:function", "--out", "own"])
    assert code == 0, capsys.readouterr().err
