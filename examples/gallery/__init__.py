"""Recommenders in many styles, none written for this project, and what an export makes of each."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from stca.examples.gallery import models

if TYPE_CHECKING:
    from stca.examples.gallery.declared import GalleryModel

NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(models.__path__)))


def load(name: str) -> GalleryModel:
    """The model of that name, one of `NAMES`."""
    model: GalleryModel = importlib.import_module(f"{models.__name__}.{name}").MODEL
    return model
