"""Why a command ended early, in one line: the fault of the machine or its files is never told as one of ours."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from stca.errors import StcaError

# Packages that come with an extra of ours, as pyproject.toml lists them; any other comes with `export`.
EXTRAS = {
    "jinja2": "report",
    "matplotlib": "report",
    "rich": "cli",
    "shtab": "cli",
    "cryptography": "sign",
    "triton": "kernels",
    "cuda": "kernels",
    "tensorrt_rtx": "tensorrt-rtx",
    "starlette": "serve",
    "uvicorn": "serve",
    "grpc": "serve",
    "prometheus_client": "serve",
}
_FIXES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "a limit on file sizes (ulimit -f) or the file system stands against it",
    errno.EACCES: "check its owner and mode",
    errno.EPERM: "check its owner and mode",
    errno.EROFS: "write to another place",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a file stands where a directory should be",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def explain(error: Exception) -> tuple[str, int]:
    """One line that says what is wrong and what to do, and the exit code."""
    if isinstance(error, StcaError):
        return _one_line(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = EXTRAS.get(error.name.partition(".")[0], "export")
        return f"the package {error.name!r} is not installed; install the extra: pip install 'stca[{extra}]'", 2
    for cause in _chain(error):
        if (number := _errno(cause)) is not None:
            place = f"{os.fsdecode(cause.filename)}: " if isinstance(cause, OSError) and cause.filename else ""
            said = os.strerror(number)
            return f"{place}{said}; {_FIXES.get(number, 'mend that and run it again')}", 2
        if isinstance(cause, MemoryError):
            return "out of memory; free some, or take smaller sizes", 2
    return f"unexpected {type(error).__name__}: {_one_line(error)}; run it again with --debug and report it", 2


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _errno(error: BaseException) -> int | None:
    """The system's error number, which libraries in Rust only write into their messages."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _one_line(error: Exception, most: int = 2000) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]}…"
