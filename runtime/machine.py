"""What this process may use: processors by affinity and quota, and whether it is the one that loaded its sessions."""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from pathlib import Path
from typing import Any, Final

# Sessions whose engines' threads a fork would not take along.
_LOADED: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def processors(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many processors this process may run on: those it is bound to, and no more than a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text(encoding="ascii").split()[:2]
        return max(1, min(bound, math.ceil(int(most) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return bound


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
