"""What this process may use: processors by affinity and quota, and whether it is the one that loaded its sessions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

# Sessions whose engines' threads a fork would not take along.
_LOADED: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def processors(root: Path = Path("/")) -> int:
    """How many processors this process may run on: those it is bound to, and no more than a container's quota.

    Args:
        root: of the files in which Linux tells of quotas, of control groups of both versions.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    files = _group_files(root, "cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    quotas = map(_quota, files)
    return max(1, min([bound, *(n for n in quotas if n is not None)]))


def memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, and no more than a container's limit.

    Args:
        root: as of `processors`.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for (file,) in _group_files(root, "memory", ("memory.max",), ("memory.limit_in_bytes",)):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            whole = min(whole, int(file.read_text(encoding="ascii")))
    return whole


def _group_files(
    root: Path, controller: str, names: tuple[str, ...], names_before: tuple[str, ...]
) -> Iterator[tuple[Path, ...]]:
    """Files that may hold a limit: of the groups this process is in, and of those around them.

    In a container the paths may be the host's; its own group is then at the root of what is mounted, as without paths.

    Args:
        root: of the files.
        controller: what is limited.
        names, names_before: of the files in a group's folder, of version 2 and of version 1.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        groups = []
    for line in ["0::/", f"1:{controller}:/", *groups]:
        number, kinds, path = [*line.split(":", 2), "", ""][:3]
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            if number == "0":
                yield tuple(root / "sys/fs/cgroup" / place / name for name in names)
            elif controller in kinds.split(","):
                yield tuple(root / "sys/fs/cgroup" / controller / place / name for name in names_before)


def _quota(files: Sequence[Path]) -> int | None:
    """Processors that a quota and its period, in one file or two, allow, whole ones; None for any number."""
    try:
        most, period = " ".join(file.read_text(encoding="ascii") for file in files).split()[:2]
        return -(-int(most) // int(period)) if int(most) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


def mark_after_fork(session: Any) -> None:
    """In a child that is forked from now on, tell `session` so by its `forked`.

    The child has the engines' memory and not their threads: to run them would wait for ever, and so would freeing them.
    """
    _LOADED.add(session)


def _in_child() -> None:
    for session in _LOADED:
        session.forked = True
        for engine in session.loaded_engines():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))  # never freed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
