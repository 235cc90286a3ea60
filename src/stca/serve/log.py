"""Logs as one JSON object a line, without anything that a client sent."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Final

LOG: Final = logging.getLogger("stca.serve")


class JsonLines(logging.Formatter):
    """A record as JSON: time, level, logger, event, and the fields that it was logged with.

    Of an exception it tells the kind and the lines it passed through; its message may hold a client's values.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            told["error"] = record.exc_info[0].__name__
            told["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(record.exc_info[2])]
        return json.dumps(told, default=str)


class Seldom(logging.Filter):
    """Lets the event loop say once a second that it has no descriptor left, which it says thousands of times."""

    _last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`."""
        if record.name != "asyncio" or "out of system resource" not in record.getMessage():
            return True
        again = record.created - self._last < 1
        self._last = self._last if again else record.created
        return not again


@contextlib.contextmanager
def logs_on_stderr(level: str) -> Iterator[None]:
    """Let the server, the sessions and the HTTP server log there, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(Seldom())
    before = []
    for name in ("stca", "uvicorn", "grpc", "asyncio"):
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers, logger.propagate, logger.level))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "stca" else logging.WARNING)
    try:
        yield
    finally:
        for logger, logger.handlers, logger.propagate, was in before:
            logger.setLevel(was)


def write(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with fields that are the server's own."""
    LOG.log(level, event, extra={"fields": fields})
