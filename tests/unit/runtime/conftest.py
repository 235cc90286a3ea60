"""What the tests of sessions share."""

from __future__ import annotations

import pytest

from stca.runtime import Session


@pytest.fixture
def log_session(bundle_dir):
    return Session.load(bundle_dir, threads=1)
