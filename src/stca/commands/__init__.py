"""The command line: each command is a thin layer over a public function.

`--json` prints one JSON object on stdout and everything else on stderr. Exit codes: 0 done, 1 a check failed, 2 bad
usage or input. An error is one line; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import stca
from stca.commands.explain import explain
from stca.commands.progress import finish
from stca.errors import one_line
from stca.near import did_you_mean

# One module of this folder each, with `HELP`, `EXAMPLES`, `options(parser)` and `run(arguments)`; in the order `--help`
# lists them. A command is called what its module is called up to an underscore: no module may shadow one of the
# standard library.
COMMANDS = (
    "export", "split", "verify", "bench", "build", "calibrate", "refit", "inspect_bundle", "score", "serve", "load",
    "plan", "report", "sign", "schema", "completion", "doctor", "demo",
)  # fmt: skip


class _BadUsage(SystemExit):
    """The end of a process that was called wrongly, and why."""

    def __init__(self, said: str) -> None:
        super().__init__(2)
        self.said = said
        print(said, file=sys.stderr)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they are written, and each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help or ""
        if action.default in (None, False, [], argparse.SUPPRESS) or "(default" in said or action.option_strings == []:
            return said
        several = isinstance(action.default, list | tuple)
        default = ",".join(map(str, action.default)) if several else str(action.default)
        return f"{said} (default: {default})"


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on bad usage and no abbreviations that a later option could make ambiguous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Help, **kwargs})

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += did_you_mean(wrong[1], re.findall(r"[^', ]+", wrong[2]))
        raise _BadUsage(one_line(f"{self.prog}: {message}; see {self.prog} --help"))

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """End for arguments that are none of this command's."""
        option = next((x.partition("=")[0] for x in extra if x.startswith("-")), "")
        meant = did_you_mean(option, self._option_string_actions) if option else ""
        self.error(f"unrecognized arguments: {' '.join(extra):.200}{meant}")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from stca.versions import installed

        versions = installed()
        print(f"stca {versions.pop('stca')} ({', '.join(f'{n} {v}' for n, v in versions.items())})")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = sys.argv[1:] if argv is None else argv
    try:
        args, extra = parser().parse_known_args(given)
        if extra:
            args.command.refuse(extra)
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that half-written bundles go
        return int(args.run(args))
    except _BadUsage as e:
        if "--json" in given:
            _tell(e.said)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        _drop_output()
        return 0
    except Exception as e:
        if "--debug" in given:
            raise
        message, code = explain(e)
        if "--json" in given:
            _tell(message)
        return _fail(message, code)
    finally:
        finish()


def _tell(message: str) -> None:
    """An error on stdout, as JSON; where nothing can be written there, it is on stderr alone."""
    try:
        print(json.dumps({"error": message}), flush=True)
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Let what stdout still holds go nowhere: the end of the process would fail of it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    finish()
    print(f"stca: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The command line's parser, with every command."""
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    made = _Parser(prog="stca", description=stca.__doc__, epilog="stca COMMAND --help has its options and examples.")
    made.add_argument("--version", action=_Version, nargs=0, help="versions of stca and of what it runs on")
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name.partition("_")[0],
            parents=[common],
            help=module.HELP,
            description=module.HELP,
            epilog="\n  ".join(["examples:", *module.EXAMPLES]),
        )
        command.set_defaults(run=module.run, command=command)
        module.options(command)
    return made
