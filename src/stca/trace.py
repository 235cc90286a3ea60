"""A trace: recorded requests with their values, and labels where someone knows them (`docs/calibration.md`).

A folder of shards. Each is a safetensors file whose tensors lie request after request, so that of a file which ends
early every request before the cut is whole. Needs numpy alone: a server that records loads nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from stca import typed_json
from stca.arrays import Array
from stca.errors import UsageError

FORMAT: Final = "stca-trace"
VERSION: Final = 1
SHARD_BYTES: Final = 4 << 20
_SHARD: Final = re.compile(r"\d{6}\.safetensors")
_LENGTH: Final = struct.Struct("<Q")
_LONGEST_HEADER: Final = 64 << 20
# safetensors' words for numpy's types.
_DTYPES: Final = {
    "BOOL": "bool", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_INPUT: Final = "input/"


@dataclass(frozen=True)
class Traced:
    """One recorded request.

    Attributes:
        inputs: by name, of one request, as `stca.runtime.Request` takes them: `(tokens, …)`, `(targets, …)`.
        labels: `(targets, tasks)` float32, what became of the targets, NaN where nobody knows; None for no labels.
        user: a pseudonym, the same for each request of a user in one trace; None for none.
        at: when the request came, in seconds since 1970; None where nobody noted it.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    user: int | None = None
    at: float | None = None

    def parts(self) -> dict[str, Array]:
        """What is kept of it, by the part's name."""
        made = {_INPUT + name: np.asarray(x) for name, x in self.inputs.items()}
        if self.labels is not None:
            made["labels"] = np.asarray(self.labels, np.float32)
        if self.user is not None:
            made["user"] = np.array(self.user, np.uint64)
        if self.at is not None:
            made["at"] = np.array(self.at, np.float64)
        return made


def _for_its_owner(path: str, flags: int) -> int:
    """Open a file that nobody else can read."""
    return os.open(path, flags, 0o600)


class TraceWriter:
    """Writes a trace. What was added since the last shard is lost when the process dies; nothing else is.

    Args:
        folder: made when it is not there; one with a trace in it is continued.
        shard_bytes: when a shard is written.
        max_bytes: most bytes of files in the folder; None for any number.

    Raises:
        UsageError: when the folder cannot be written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES, max_bytes: int | None = None
    ) -> None:
        self.folder, self._shard_bytes, self._max_bytes = Path(folder), shard_bytes, max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # histories of users
            shards = _shards(self.folder)
            self.bytes = sum(s.stat().st_size for s in shards)
        except OSError as e:
            raise _unwritable(self.folder, e) from e
        self._next = 1 + max((int(s.stem) for s in shards), default=-1)
        self._waiting: list[dict[str, Array]] = []
        self._held = 0

    def add(self, request: Traced) -> bool:
        """Take a request; False, and nothing is kept, where it does not fit into `max_bytes`.

        Raises:
            UsageError: when an input has no plain type, or a shard cannot be written.
        """
        labels = np.asarray([[]] if request.labels is None else request.labels)
        if labels.ndim != 2 or labels.dtype.kind not in "biuf":
            what = f"are {labels.dtype!s:.60} of shape {list(labels.shape)}"
            raise UsageError(f"labels: {what}; give numbers of shape (targets, tasks), NaN where nobody knows")
        parts = request.parts()
        for name, x in parts.items():
            if x.dtype.name not in _NAMES:
                raise UsageError(f"{name.removeprefix(_INPUT)}: has dtype {x.dtype!s:.60}, which a trace cannot hold")
        # A name, a type, a shape and two offsets take about so many bytes of the header.
        size = sum(x.nbytes + len(name) + 100 for name, x in parts.items())
        if self._max_bytes is not None and self.bytes + self._held + size + 256 > self._max_bytes:
            return False
        self._waiting.append({n: np.array(x) for n, x in parts.items()})
        self._held += size
        if self._held >= self._shard_bytes:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits as a shard of its own.

        Raises:
            UsageError: when it cannot be written; what waited is dropped.
        """
        if not self._waiting:
            return
        waiting, self._waiting, self._held = self._waiting, [], 0
        try:
            with self._fresh() as f:
                _write(f, waiting)
                self.bytes += f.tell()
        except OSError as e:
            raise _unwritable(self.folder, e) from e

    def _fresh(self) -> BinaryIO:
        """The next shard, which no other writer has: several processes may record into one folder."""
        while True:
            with contextlib.suppress(FileExistsError):
                return open(self.folder / f"{self._next:06}.safetensors", "xb", opener=_for_its_owner)
            self._next += 1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


class Trace:
    """Reads a trace, a request at a time.

    Args:
        folder: with shards in it.

    Attributes:
        lost: requests that a shard names and does not hold to their end, in what was read so far.

    Raises:
        UsageError: when there is no trace.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.lost = Path(folder), 0
        try:
            self._files = _shards(self.folder)
        except OSError as e:
            raise UsageError(f"{self.folder}: cannot be read as a trace ({e.strerror}); name a folder of shards") from e
        if not self._files:
            below = sorted({str(f.parent) for f in self.folder.glob("*/**/*.safetensors") if _SHARD.fullmatch(f.name)})
            lies = f"traces lie in {', '.join(below):.600}" if below else "name the folder that a session recorded into"
            raise UsageError(f"{self.folder}: is not a trace, it has no shards (000000.safetensors, …); {lies}")

    def __iter__(self) -> Iterator[Traced]:
        """The requests in their order.

        Raises:
            UsageError: naming the shard that is no part of a trace.
        """
        self.lost = 0
        for file in self._files:
            try:
                with file.open("rb") as f:
                    yield from self._requests(f)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
                raise UsageError(f"{file}: is no shard of a trace ({e!s:.200}); copy or record it again") from e

    def _requests(self, file: BinaryIO) -> Iterator[Traced]:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return
        (length,) = _LENGTH.unpack(head)
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header has {length} bytes")
        text = file.read(length)
        if len(text) < length:
            return
        begin = _LENGTH.size + length
        for parts in _by_request(typed_json.parse(text.decode())):
            if begin + max(p.end for p in parts.values()) > size:
                self.lost += 1
                continue
            yield _traced({name: _part(file, begin, part) for name, part in parts.items()})


class _Part(NamedTuple):
    """Where a tensor lies behind the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _shards(folder: Path) -> list[Path]:
    return sorted(folder / name for name in os.listdir(folder) if _SHARD.fullmatch(name))


def _write(file: BinaryIO, requests: list[dict[str, Array]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
    end = 0
    for number, parts in enumerate(requests):
        for name, x in parts.items():
            place = [end, end + x.nbytes]
            header[f"{number}/{name}"] = {"dtype": _NAMES[x.dtype.name], "shape": list(x.shape), "data_offsets": place}
            end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(_LENGTH.pack(len(text)) + text)
    for parts in requests:
        for x in parts.values():
            file.write(x.tobytes())


def _by_request(header: Any) -> list[dict[str, _Part]]:
    """The parts of each request, by its number.

    Raises:
        ValueError, TypeError, KeyError: when this is not a shard's header.
    """
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"it does not say format {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"it has version {metadata.get('version')!r:.40}, this stca reads {VERSION}; upgrade stca")
    made: dict[int, dict[str, _Part]] = {}
    for key, entry in header.items():
        number, _, name = key.partition("/")
        begin, end = (int(n) for n in entry["data_offsets"])
        part = _Part(np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"]), begin, end)
        if min((begin, *part.shape)) < 0 or end - begin != math.prod(part.shape) * part.dtype.itemsize:
            raise ValueError(f"{key:.80} has another size than its shape")
        made.setdefault(int(number), {})[name] = part
    return [made[number] for number in sorted(made)]


def _part(file: BinaryIO, start: int, part: _Part) -> Array:
    file.seek(start + part.begin)
    return np.frombuffer(file.read(part.end - part.begin), part.dtype).reshape(part.shape)


def _traced(parts: Mapping[str, Array]) -> Traced:
    inputs = {name.removeprefix(_INPUT): x for name, x in parts.items() if name.startswith(_INPUT)}
    user, at = parts.get("user"), parts.get("at")
    return Traced(inputs, parts.get("labels"), None if user is None else int(user), None if at is None else float(at))


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder}: a trace cannot be written there ({error.strerror}); name another folder")
