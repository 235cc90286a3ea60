"""Fixtures of several tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.bundles import write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small bundle of made-up files, as `support.bundles` has them."""
    return write(tmp_path / "B").path
