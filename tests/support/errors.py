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
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert message.strip(), "an empty message"
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
