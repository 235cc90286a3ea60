"""The public names, as `docs/architecture.md` lists them: they are there, and their parameters are documented."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _listed() -> Iterator[tuple[str, str]]:
    section = (
        (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Public names")[1].split("\n## ")[0]
    )
    for module, told in re.findall(r"^\| `(stca[\w.]*)` \| (.+) \|$", section, re.M):
        names = re.findall(r"`(\w+)`", told)
        if names == ["__all__"]:
            names = importlib.import_module(module).__all__
        if told == "every error":
            names = [n for n, v in vars(importlib.import_module(module)).items() if inspect.isclass(v)]
        assert names, module
        yield from ((module, name) for name in names)


NAMES = list(_listed())


def _functions(value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    if inspect.isfunction(value):
        yield value.__name__, value
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if not name.startswith("_") and isinstance(member, classmethod | staticmethod | type(_functions)):
                yield f"{value.__name__}.{name}", getattr(value, name)


def test_the_list_is_a_list() -> None:
    assert len(NAMES) > 40
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_it_is_there_and_documented(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    assert inspect.getdoc(value), name
    for where, function in _functions(value):
        words = inspect.getdoc(function) or ""
        assert words, where
        parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        for parameter in parameters if len(parameters) > 2 else ():
            assert re.search(rf"\b{parameter}\b[^\n]*:", words), f"{where}: {parameter} is not documented"
