"""What a module is asked that needs a copy of the user for each target."""

from __future__ import annotations

import pytest

from stca.checks.row_by_row import MOST, with_fewer_copies
from stca.specs import TensorSpec

ITEM = TensorSpec("item", "int64", ("N_t",), "target", 9)
FREE = (TensorSpec("history", "int64", (1, "N_h"), "user", 9), ITEM)
FIXED = (TensorSpec("history", "int64", (1, 2000), "user", 9), ITEM)


@pytest.mark.parametrize(("tokens", "targets"), [(0, 16), (1, 16), (64, 1), (40, 5), (100, 300)])
def test_small_requests_are_asked_as_they_are(tokens, targets):
    assert with_fewer_copies(FREE, tokens, targets) == [(tokens, targets)]


def test_a_long_history_and_many_targets_are_asked_apart():
    asked = with_fewer_copies(FREE, 1000, 300)
    assert {n for n, _ in asked} == {1000, 100}
    assert {m for _, m in asked} == {30, 300}
    assert all(n * m <= MOST for n, m in asked)


def test_a_fixed_history_gets_no_shorter():
    assert with_fewer_copies(FIXED, 1000, 300) == [(1000, 300)]
