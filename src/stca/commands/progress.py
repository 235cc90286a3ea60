"""Progress on stderr: a bar on a terminal where rich is installed (extra `cli`), plain lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from stca.arrays import Step

if TYPE_CHECKING:
    from rich.progress import Progress

_shown: list[_Bar] = []  # at most one: a process has one terminal


class _Bar:
    """One moving line with what is being done, how far it is, and the time since the command began."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task("", total=None)
        bar.start()

    def __call__(self, step: str) -> None:
        done, total = (step.done, step.total) if isinstance(step, Step) else (0, None)
        self.bar.update(self.task, description=step, completed=done, total=total)


class _Lines:
    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, step: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {step}", file=sys.stderr, flush=True)


def progress_on_stderr(loading: str = "") -> _Bar | _Lines:
    """What a command tells each step to.

    Args:
        loading: libraries that the command imports next, which takes seconds; said at once.
    """
    told: _Bar | _Lines = _Lines()
    if sys.stderr.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
            )
            told = _Bar(Progress(*columns, console=Console(file=sys.stderr), transient=True))
            _shown.append(told)
    if loading:
        told(f"loading {loading}")
    return told


def finish() -> None:
    """Take the bar off the terminal, before anything else is written to it."""
    while _shown:
        _shown.pop().bar.stop()
