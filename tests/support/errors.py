"""What every error a user can meet must be: the right class, one line, with the thing and the fix in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stca.errors import StcaError


@contextmanager
def one_line(kind: type[StcaError], *words: str) -> Iterator[None]:
    """Expect `kind` (not a subclass's sibling, not a bare traceback) whose single line has all of `words`."""
    with pytest.raises(StcaError) as caught:
        yield
    _check(caught.value, kind, *words)


@contextmanager
def nothing_or_one_line(kind: type[StcaError]) -> Iterator[None]:
    """Expect no exception, or `kind` as in `one_line`; for input of which a part happens to be right."""
    try:
        yield
    except StcaError as e:
        _check(e, kind)


def _check(error: StcaError, kind: type[StcaError], *words: str) -> None:
    message = str(error)
    assert type(error) is kind, repr(error)
    assert message.strip(), "an empty message"
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
