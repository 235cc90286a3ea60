"""Directories that are put in place in one step: locks, names that are exchanged, files that two of them share."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path
from typing import Final

from stca.manifest import WEIGHTS

# What a directory is called for the moment in which another takes its name, where names cannot be exchanged.
ASIDE: Final = ".old"
# Of a path on Linux.
LONGEST_PATH: Final = 4096


def named(path: object) -> str | None:
    """A path's text; None of what is no path, or one of bytes."""
    try:
        text: object = os.fspath(path)  # type: ignore[call-overload]
    except Exception:  # whatever the code of a caller's object raises
        return None
    return text if isinstance(text, str) else None


def usable(path: object) -> bool:
    """Whether a path may lead somewhere: text, not empty or longer than any path, of characters that names can have."""
    text = named(path)
    with contextlib.suppress(UnicodeEncodeError):
        return text is not None and 0 < len(os.fsencode(text)) <= LONGEST_PATH and "\0" not in text
    return False


def lock(directory: int, *, wait: bool = False) -> None:
    """Lock an open directory for as long as it is open; the system lets go when the process ends, however it ends.

    Raises:
        OSError: when another process has the lock, or there are no such locks here.
    """
    try:
        import fcntl
    except ImportError as e:
        raise OSError("no locks") from e
    fcntl.flock(directory, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def read(file: Path, most: int) -> bytes:
    """A file's bytes; of a larger one, or one without an end, one more than `most`, and no others."""
    with file.open("rb") as f:
        return f.read(most + 1)


def sync(path: Path) -> None:
    """Have a file or directory on the disk before anything else."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(work: Path, target: Path) -> None:
    """Give the directory `work` the name `target`; what had it is then `work`."""
    if not target.exists():
        os.rename(work, target)
    elif not _exchange(work, target):
        # A file system that cannot exchange two names: for a moment no bundle has the name, but both are whole.
        aside = work.with_name(work.name + ASIDE)
        os.rename(target, aside)
        os.rename(work, target)
        os.rename(aside, work)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories' names atomically (Linux `renameat2`, RENAME_EXCHANGE); False where that cannot be had."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)


def umask() -> int:
    """The permissions a new file of this process lacks."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def share(source: Path, target: Path) -> None:
    """One file under two names, or a copy where that cannot be had.

    Weights are always copied. ONNX refuses external data that has two names, and a process killed before it took the
    second name away would leave the old bundle unreadable.
    """
    if source.name != WEIGHTS and source.suffix != ".weights":
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
