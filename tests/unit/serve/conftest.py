"""What the tests of the server share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.serving import Running, running

from stca import probe


@pytest.fixture(scope="module")
def server(bundle_dir: Path) -> Iterator[Running]:
    with running(bundle_dir) as made:
        yield made


@pytest.fixture
def asked(server: Running) -> Callable[..., dict[str, np.ndarray[Any, Any]]]:
    """Random valid inputs of one request, by history and targets."""

    def ask(tokens: int = 5, targets: int = 3, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        inputs = server.served.session.manifest.graphs["request"].inputs
        return probe.single(inputs, tokens, targets, np.random.default_rng(seed))

    return ask
