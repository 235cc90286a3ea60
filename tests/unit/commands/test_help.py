"""Help, versions and completion: what a new user reads first."""

from __future__ import annotations

import argparse
import shlex

import pytest

from stca import commands
from stca.commands.options import count


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
            shown = ",".join(map(str, x)) if isinstance(x := action.default, list | tuple) else x
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


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["load", "b", "--histroy", "3"], ("stca load", "--histroy", "did you mean '--history'?")),
        (["exprot"], ("'exprot'", "did you mean 'export'?")),
        (["build", "b", "--engine", "onnxruntme"], ("did you mean 'onnxruntime'?",)),
        (["inspect", "b", "--nothing-like-it"], ("--nothing-like-it",)),
        (["build", "b", "--engine", "tensorrt", "--sm", "8.9.1"], ("89 or 8.9",)),
        (["load", "b", "--threads", "5000000000000000000"], ("from 1 to 4611686018427387903",)),
        (["load", "b", "--threads", "0" * 30], ("from 1 to",)),
        (["load", "b", "--threads", "9" * 5000], ("from 1 to",)),
    ],
)
def test_a_wrong_word_is_told_the_nearest_right_one(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(argv)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in words)
    assert ("did you mean" in said) == any("did you mean" in word for word in words)


def test_a_compute_capability_is_taken_with_its_point():
    made = [commands.parser().parse_args(["build", "b", "--engine", "tensorrt", "--sm", x]).sm for x in ("89", "8.9")]
    assert made == [89, 89]


def test_defaults_are_told_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        commands.main(["load", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 100,2000)" in said


def test_zeros_before_a_number_count_for_nothing() -> None:
    assert count("0" * 30 + "7") == 7
