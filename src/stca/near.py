"""What somebody may have meant, where a name is none of those there are."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'hist'?` for a message, of the nearest of the names; empty where none is near.

    Near is what a third of its letters, changed, left out or put in, make of it; C++ has the same rule.
    """
    most = max(1, min(len(name), 60) // 3)
    found = min(((_distance(name[:60].lower(), k[:60].lower()), k) for k in known), key=lambda x: x[0], default=None)
    return f"; did you mean {found[1]!r}?" if found is not None and found[0] <= most else ""


def _distance(a: str, b: str) -> int:
    """Letters to change, leave out or put in to make `b` of `a` (Levenshtein's distance)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
