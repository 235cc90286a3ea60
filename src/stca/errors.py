"""Every error a user can meet. The message is one line: what is wrong, and what to do about it."""

from __future__ import annotations

import re


class StcaError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with `exit_code`.

    `code` tells the kinds apart, the same in Python and C++.
    """

    exit_code = 2
    code = "error"

    def __init__(self, message: object = "", *more: object) -> None:
        super().__init__(one_line(str(message)), *more)


class CheckpointError(StcaError):
    """A checkpoint or its config cannot be used: wrong key, shape, dtype, or a format that would execute code."""


class ExportError(StcaError):
    """A model cannot be turned into an ONNX request graph."""


class SplitError(StcaError):
    """A graph cannot be cut into user encoder and target scorer, or a postcondition of the cut failed."""


class BuildError(StcaError):
    """An engine cannot be built from a graph."""


class BundleError(StcaError):
    """A bundle on disk is missing, damaged, too new, or not a bundle."""

    code = "bad_bundle"


class ParityError(StcaError):
    """Numbers left their tolerance: a check failed, as opposed to bad input."""

    exit_code = 1


class UsageError(StcaError):
    """A call's options are not of the kind or in the range it takes; nothing was done."""

    code = "usage"


class EngineError(StcaError):
    """An engine failed on inputs that passed the door: out of memory, a broken kernel. The request may be right."""

    exit_code = 1
    code = "engine"


class RequestError(StcaError):
    """A request was refused at the door; the message names the field, the value and the limit."""

    code = "bad_request"


class HistoryNeededError(RequestError):
    """No state of the user's history is kept, and the request does not bring it: send it again with the user inputs."""

    code = "history_needed"


class DeadlineError(StcaError):
    """The time that a call's answer was wanted for is over; work that had not begun was left undone."""

    exit_code = 1
    code = "deadline"


class CancelledError(StcaError):
    """The caller no longer wants the answer; work that had not begun was left undone."""

    exit_code = 1
    code = "cancelled"


# What comes before a message of ONNX Runtime's: its code, and the file and function of its own source.
_ORIGIN = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:|"
    r"/onnxruntime_src/\S+:\d+ [^(]*\([^()]*\)( const)? "
)


def said(error: object) -> str:
    """What an error, or a text, says: on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def told(error: object) -> str:
    """An error of any library on one line: its type and what it says."""
    return f"{type(error).__name__}: {said(error)}"


def said_by_onnxruntime(error: Exception) -> str:
    """What it says without where in ONNX Runtime's source it comes from, at most 300 characters."""
    return said(_ORIGIN.sub("", " ".join(str(error).split())))


def one_line(text: str) -> str:
    """A message without what would end or overwrite its line, its middle left out beyond 900 characters."""
    line = " ".join(text.split()) if not text.isprintable() else text
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= 900 else f"{line[:440]} … {line[-440:]}"
