"""Opening what is in a bundle while other processes may replace it: what was checked is what is open."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from stca.bundle import Bundle, names, require_path
from stca.errors import BundleError
from stca.signature import Key

# How often a bundle that is being replaced is read where it lies.
_PATIENCE: Final = 3
T = TypeVar("T")


def opened(
    path: str | os.PathLike[str], use: Callable[[Bundle], T], *, trusted: Key | None = None, tries: int = 50
) -> T:
    """Load a bundle and open what is in it, so that what was checked is what is open.

    Another process may replace the bundle between the moments at which its files are read. Then all of it is read
    again, and nothing that was opened meanwhile is used; where that happens again and again, out of a copy of its own.

    Args:
        path, trusted: see `Bundle.load`.
        use: opens the files of a checked bundle.
        tries: how often a bundle may be replaced meanwhile.

    Raises:
        BundleError: as `Bundle.load`, and when the bundle is replaced faster than it can be read.
        Exception: what `use` raises on a bundle that stays as it is.
    """
    require_path(path)
    last = ""
    for turn in range(tries):
        settled: Exception | None = None
        source = _identity(path)  # of before the copy, which may be made of a bundle that is being removed
        try:
            with contextlib.nullcontext(path) if turn < _PATIENCE else _copy(Path(path)) as place:
                own = turn >= _PATIENCE
                lies_there, whole = _identity(place, own), False
                try:
                    found = Bundle.load(place, trusted=trusted)
                    whole = own
                    made = use(found)
                except Exception as e:
                    # What could be read whole out of a copy is a bundle as it was once: what fails is its own fault.
                    if _identity(place, own) == lies_there and (whole or _identity(path) == source):
                        settled = e
                    raise
                if _identity(place, own) == lies_there:  # a copy too: its files may be the writer's own
                    return made
        except Exception as e:
            if e is settled:
                raise
            last = str(e)
        finally:
            settled = None  # an error that its own frame holds keeps what was opened until the collector comes by
    why = f" (the last try: {last})" if last else ""
    raise BundleError(f"{path}: is replaced faster than it can be read{why}; load it when its writer has finished")


@contextlib.contextmanager
def _copy(root: Path) -> Iterator[Path]:
    """The files of a directory in one of our own, linked where that can be had: too quick to be overtaken twice."""
    with tempfile.TemporaryDirectory(prefix="stca-bundle-") as own:
        for name in names(root):
            file = os.path.realpath(root / name)
            try:
                os.link(file, Path(own) / name)
            except OSError:
                shutil.copy2(file, Path(own) / name)
        yield Path(own)


def _identity(path: str | os.PathLike[str], own: bool = False) -> tuple[tuple[object, ...], ...]:
    """What changes when a bundle, or a file of it, is replaced or written to; of links, what they lead to. Of an `own`
    copy, when it is written to: that its files' other names come and go is no change.
    """
    try:
        files = sorted(names(path))
        stats = [(name, os.stat(os.path.join(path, name) if name else path)) for name in ("", *files)]
    except (OSError, ValueError):  # it leads nowhere: whoever loads it says so
        return ()
    # Numbers of removed files are given again, and copies keep the time of their contents: only ctime is never set.
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns if own else s.st_ctime_ns) for name, s in stats)
