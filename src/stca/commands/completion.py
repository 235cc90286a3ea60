"""`stca completion`: a script with which a shell completes commands and options."""

from __future__ import annotations

import argparse

HELP = "a script with which a shell completes commands and options (needs the extra cli)"
EXAMPLES = (
    'eval "$(stca completion bash)"',
    "stca completion zsh > ~/.zfunc/_stca",
)
# What the shell offers where an argument has one of these names.
_PLACES = ("BUNDLE", "CHECKPOINT", "NEW", "FILE", "MODEL.onnx", "REQUESTS", "KEY", "DIR")


def options(p: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell that will read the script")


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    import shtab

    from stca.commands import parser
    from stca.commands.options import emit

    whole = parser()
    for command in _subparsers(whole):
        for action in command._actions:
            if action.metavar in _PLACES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(whole, shell=args.shell)
    emit(args, {"shell": args.shell, "script": script}, script)
    return 0


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [command for group in groups for command in group.choices.values()]
