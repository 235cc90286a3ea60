"""Help, versions and completion: what a new user reads first."""

from __future__ import annotations

import argparse
import shlex

import pytest

from stca import commands


def _commands() -> dict[str, argparse.ArgumentParser]:
    groups = [a for a in commands.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(groups[0].choices)


@pytest.mark.parametrize("name", _commands())
def test_help_has_examples_and_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = _commands()[name]
    said = " ".join(command.format_help().split())
    assert "examples:" in said
    for action in command._actions:
        assert action.help, f"{name}: {action.dest} has no help"
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            shown = ",".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            assert f"(default: {shown})" in said


@pytest.mark.parametrize("name", _commands())
def test_examples_are_valid(name: str) -> None:
    import importlib

    module = next(n for n in commands.COMMANDS if n.partition("_")[0] == name)
    for example in importlib.import_module(f"stca.commands.{module}").EXAMPLES:
        words = shlex.split(example.removeprefix('eval "$(').removesuffix(')"'))
        words = words[1 : next((i for i, w in enumerate(words) if w in "<>"), None)]
        assert commands.parser().parse_args(words).run


def test_version_names_what_it_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime
    import torch

    with pytest.raises(SystemExit) as done:
        commands.main(["--version"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert f"onnxruntime {onnxruntime.__version__}" in said
    assert f"torch {torch.__version__}" in said
    assert "onnx " in said


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "inspect" in script
    assert "--history-buckets" in script


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal one moving line, which is gone when the result is printed; plain lines elsewhere."""
    import sys

    from stca.arrays import Step
    from stca.commands.progress import finish, progress_on_stderr

    progress_on_stderr("torch")("splitting")
    plain = capsys.readouterr().err
    assert plain.count("\n") == 2
    assert "loading torch" in plain

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    progress_on_stderr("torch")(Step("history [1], 2 targets", 3, 4))
    finish()
    moving = capsys.readouterr().err
    assert "history [1], 2 targets" in moving
    assert "\x1b[?25h" in moving  # the cursor is back
