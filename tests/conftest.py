"""What all tests share. Exports take seconds each, so there is one of each kind per run; tests must not change them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# Models in tests are tiny: a second thread costs more in waiting than it computes, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is slow now and then; that says nothing of the code.
settings.register_profile("stca", deadline=None)
settings.load_profile("stca")

Exporter = Callable[[str, str], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """C++ compiles for minutes and therefore starts first."""
    items.sort(key=lambda item: item.path.parent.name != "runtime_cpp")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose own groups pytest 9.2 does not know any more
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests, and all of C++, in one process each: they share what takes long to make."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "C++" if "/runtime_cpp/" in file else file

    return ByFile(config, log)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of the tiny model, by its `time`."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def save(time: str) -> Path:
        from support import tiny

        from stca.export.reference.checkpoint import save_checkpoint

        file = root / f"{time}.safetensors"
        save_checkpoint(file, tiny.module(tiny.config(time=time)))
        return file

    return save


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint_file: Callable[[str], Path]) -> Exporter:
    """The tiny model's bundle, by its `time` and attention form, without a parity report. Not to be written to."""
    root = tmp_path_factory.mktemp("bundles")

    @cache
    def export(time: str, form: str) -> Path:
        from support import tiny

        from stca.export.pipeline import export_checkpoint
        from stca.export.reference.checkpoint import load_checkpoint

        out = root / f"{time}-{form}"
        export_checkpoint(load_checkpoint(checkpoint_file(time)), out, prove=tiny.no_proof, form=form)  # type: ignore[arg-type]
        return out

    return export


@pytest.fixture(scope="session")
def bundle_dir(exported: Exporter) -> Path:
    """The one most tests use: absorbed, time from the log. Not to be written to."""
    return exported("log", "absorbed")


@pytest.fixture
def other_weights(tmp_path: Path, bundle_dir: Path) -> Path:
    """The same graphs with every weight a little different."""
    import safetensors.torch

    from stca.bundle import Bundle, seal, sha256_of
    from stca.manifest import WEIGHTS

    shutil.copytree(bundle_dir, tmp_path / "other")
    weights = safetensors.torch.load_file(bundle_dir / WEIGHTS)
    safetensors.torch.save_file({n: w * 1.1 for n, w in weights.items()}, tmp_path / "other" / WEIGHTS)
    digest = sha256_of(tmp_path / "other" / WEIGHTS)
    seal(tmp_path / "other", dataclasses.replace(Bundle.load(bundle_dir).manifest, weights=digest))
    return tmp_path / "other"
