"""What a policy decided, in a file, and a policy that decides it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from stca import typed_json
from stca.arrays import Array
from stca.errors import UsageError
from stca.runtime.memory_pool import SplitPolicy


class Recorded:
    """Another policy, whose decisions are added to a file: a line each, as JSON, pages by name.

    Args:
        policy: decides.
        file: made if need be. Where it cannot be written to, the split stays as it is, and the log says so.
    """

    def __init__(self, policy: SplitPolicy, file: str | os.PathLike[str]) -> None:
        self._policy, self._file = policy, Path(file)

    def wanted(self, pages: Mapping[str, int], saved: Mapping[str, Array]) -> Mapping[str, int]:
        """See `SplitPolicy`."""
        said = {name: int(n) for name, n in self._policy.wanted(pages, saved).items()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")
        return said


class Replayed:
    """The decisions of a file, one after the other, whatever is asked for; after the last, the split stays.

    Args:
        file: as `Recorded` writes it.

    Raises:
        UsageError: when it cannot be read, or naming the line that is no split.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        lines = []
        try:
            for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
                lines.append(typed_json.as_type(Mapping[str, int], typed_json.parse(line), f"line {number}"))
        except (OSError, ValueError, TypeError, RecursionError) as e:
            raise UsageError(f"{os.fspath(file)}: {getattr(e, 'strerror', None) or e}; each line is a split") from e
        self._left = iter(lines)

    def wanted(self, pages: Mapping[str, int], saved: Mapping[str, Array]) -> Mapping[str, int]:
        """See `SplitPolicy`."""
        return next(self._left, pages)
