"""Work that may kill or hang its process, done in a child process that is replaced when that happens."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Lost(Exception):
    """Why there is no answer: the child died, or took too long."""


def answers(
    asked: Iterable[Asked], work: Callable[[Asked], Answer], seconds: float
) -> Iterator[tuple[Asked, Answer | Lost]]:
    """Each thing asked with what `work` makes of it, in order; `Lost` where the child dies or takes over `seconds`.

    `work` must be importable by name, as `multiprocessing` wants it.
    """
    child = _Child(work)
    try:
        for one in asked:
            try:
                yield one, child.ask(one, seconds)
            except Lost as e:
                child.stop()
                child = _Child(work)
                yield one, e
    finally:
        child.stop()


class _Child(Generic[Asked, Answer]):
    def __init__(self, work: Callable[[Asked], Answer]) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, work), daemon=True)
        self._process.start()
        there.close()
        self._here.recv()  # that it is ready: imports take longer than most work

    def ask(self, one: Asked, seconds: float) -> Answer:
        self._here.send(one)
        try:
            if not self._here.poll(seconds):
                raise Lost(f"more than {seconds:.0f} s")
            answer: Answer = self._here.recv()
            return answer
        except EOFError:
            self._process.join()
            raise Lost(f"exit code {self._process.exitcode}") from None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._here.close()


def _serve(pipe: Connection, work: Callable[[Asked], Answer]) -> None:
    warnings.simplefilter("ignore")  # numpy's, of values that a proof refuses in its own words
    pipe.send("ready")
    while True:
        try:
            pipe.send(work(pipe.recv()))
        except EOFError:
            return
