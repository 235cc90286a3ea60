"""`stca calibrate` as tests ask for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stca.bundle import Bundle
from stca.trace import Traced, TraceWriter


def command_on(bundle: Bundle, requests: Iterable[Traced], folder: Path) -> list[str]:
    """The command on a trace of these requests, written into `folder`, under a budget that nearly anything holds."""
    with TraceWriter(folder / "trace") as writer:
        assert all(map(writer.add, requests))
    quick = ["--budget", "top10=0.5", "--seconds", "0.01", "--threads", "1"]
    return ["calibrate", str(bundle.path), "--trace", str(folder / "trace"), *quick]
