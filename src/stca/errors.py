"""Every error a user can meet. The message is one line: what is wrong, and what to do about it."""

from __future__ import annotations


class StcaError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


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


class ParityError(StcaError):
    """Numbers left their tolerance: a check failed, as opposed to bad input."""

    exit_code = 1


class EngineError(StcaError):
    """An engine failed on inputs that passed the door: out of memory, a broken kernel. The request may be right."""

    exit_code = 1


class RequestError(StcaError):
    """A request was refused at the door; the message names the field, the value and the limit."""
