"""What a session is loaded with, checked before anything is opened."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from stca import folders
from stca.errors import UsageError
from stca.runtime.client_values import quoted
from stca.runtime.recording import Recording
from stca.signature import Key

# Pages that `cache_bytes` is shared out in.
POOL_PAGES: Final = 128

if TYPE_CHECKING:
    from stca.runtime.memory_pool import SplitPolicy
    from stca.runtime.tables import RowSource

# An execution provider, or one with its options.
Provider: TypeAlias = str | tuple[str, Mapping[str, Any]]
CPU: Final = "CPUExecutionProvider"
# More threads than any machine's cores are a mistake, and each takes memory.
_MOST_THREADS: Final = 1024
_MOST_GPUS: Final = 1023


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """How ONNX Runtime runs a bundle's own graphs.

    Attributes:
        providers: its execution providers in order of preference, each a name or `(name, options)`. One that cannot be
            loaded is an error.
        config: session configuration entries by ONNX Runtime's own names, `session.intra_op.allow_spinning` say.
    """

    providers: Sequence[Provider] = (CPU,)
    config: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = isinstance(self.providers, Sequence) and not isinstance(self.providers, str) and len(self.providers)
        if not named or not all(map(_is_provider, self.providers)):
            _refuse("providers", self.providers, "a list of execution providers, each a name or (name, options)")
        entries = self.config.items() if isinstance(self.config, Mapping) else [(None, None)]
        if not all(isinstance(text, str) for entry in entries for text in entry):
            _refuse("config", self.config, "ONNX Runtime's session entries, text by name")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a session loads bundles, the first one and those swapped in; `Session.load` says what each is.

    Raises:
        UsageError: naming the option, its value and what it may be.
    """

    cache_bytes: int
    threads: int | None
    truncate: bool
    engine: str | None
    precision: str | None
    trusted: Key | None
    native_code: bool
    max_users: int | None
    max_targets: int
    ttl_seconds: float | None
    check_finite: bool
    check_versions: bool
    state_folder: str | os.PathLike[str] | None
    state_folder_bytes: int
    batch_seconds: float | None
    batch_tokens: int
    onnxruntime: OnnxRuntimeOptions | None
    gpu: int
    tables: Mapping[str, RowSource] | None
    record: Recording | None
    split: SplitPolicy | None

    @property
    def page_bytes(self) -> int | None:
        """Of a page of the pool; None where there is none."""
        return None if self.split is None else self.cache_bytes // POOL_PAGES

    def __post_init__(self) -> None:
        for name, least, most in (
            ("cache_bytes", 0, sys.maxsize),
            ("threads", 1, _MOST_THREADS),
            ("max_users", 0, sys.maxsize),
            ("max_targets", 1, sys.maxsize),
            ("gpu", 0, _MOST_GPUS),
            ("state_folder_bytes", 0, sys.maxsize),
            ("batch_tokens", 1, sys.maxsize),
        ):
            value = getattr(self, name)
            if value is not None or name in ("cache_bytes", "max_targets", "gpu", "state_folder_bytes", "batch_tokens"):
                object.__setattr__(self, name, _whole(name, value, least, most))
        for name in ("truncate", "check_finite", "check_versions", "native_code"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        for name in ("engine", "precision"):
            if (value := getattr(self, name)) is not None:
                if not isinstance(value, str):
                    _refuse(name, value, "text or None")
                object.__setattr__(self, name, str.__str__(value))  # a subclass compares as it likes
        if self.state_folder is not None and not folders.usable(self.state_folder):
            _refuse("state_folder", self.state_folder, "a folder's path or None")
        if self.trusted is not None and not isinstance(self.trusted, bytes) and not folders.usable(self.trusted):
            _refuse("trusted", self.trusted, "a public key in PEM, as bytes or a file's path, or None")
        for name, shortest in (("ttl_seconds", math.ulp(0.0)), ("batch_seconds", 0.0)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _seconds(name, getattr(self, name), shortest))
        given = {} if self.tables is None else self.tables
        if not isinstance(given, Mapping) or not all(callable(getattr(x, "rows", None)) for x in given.values()):
            _refuse("tables", self.tables, "objects with rows(ids), by the tables' names, or None")
        if not isinstance(self.record, Recording | None):
            _refuse("record", self.record, "a Recording or None")
        if self.split is not None and not callable(getattr(self.split, "wanted", None)):
            _refuse("split", self.split, "a policy with wanted(pages, saved), such as MarginalUtility(), or None")
        if not isinstance(self.onnxruntime, OnnxRuntimeOptions | None):
            _refuse("onnxruntime", self.onnxruntime, "OnnxRuntimeOptions or None")
        if self.onnxruntime is not None and self.engine not in (None, "graphs"):
            raise UsageError(
                f"onnxruntime: is of the bundle's own graphs, not of engine {self.engine!r:.60}; leave one out"
            )
        if self.precision is not None and self.engine in (None, "graphs"):
            raise UsageError(f"precision: {self.precision!r:.60} is of a built engine; say which with engine=")


def _is_provider(given: object) -> bool:
    if isinstance(given, tuple) and len(given) == 2:
        return isinstance(given[0], str) and isinstance(given[1], Mapping)
    return isinstance(given, str)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number: int | None = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        wanted = f"a whole number from {least}" + (f" to {most}" if most < sys.maxsize else "")
        _refuse(name, value, wanted)
    return number


def _seconds(name: str, value: Any, least: float) -> float:
    number = None if isinstance(value, bool | str | bytes) else value
    try:
        number = math.nan if number is None else float(number)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number < math.inf:
        _refuse(name, value, f"seconds {'above' if least else 'from'} 0, or None")
    return number


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise UsageError(f"{name}: is {quoted(value)}, expected {wanted}")
