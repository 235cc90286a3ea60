"""One user state as a file: a digest over all of it, what it is of, and its tensors' bytes.

No name is in it: user and version are digests under a key of the folder's own.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import struct
import uuid
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from stca import typed_json
from stca.arrays import Array

_MAGIC: Final = b"stca user state 1\n"
_DIGEST: Final = hashlib.sha256
# The magic, the digest of all that follows the header's length, and that length.
_PREFIX: Final = struct.Struct(f"<{len(_MAGIC)}s{_DIGEST().digest_size}sI")
_LONGEST_HEADER: Final = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """One tensor of a record: its name, numpy's word for its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it.

        Raises:
            ValueError: when it has no bytes of its own.
        """
        dtype = np.dtype(self.dtype)
        if dtype.hasobject or min(self.shape, default=0) < 0:
            raise ValueError(f"{self.name} is no plain tensor")
        return dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a record is of.

    Attributes:
        user, version, kind: digests; the kind is that of weights and state format.
        born: when the state was made, in seconds since 1970.
        tokens: history tokens in it.
        history: digest of the user inputs, where versions are checked.
        tensors: in the order of their bytes.
    """

    user: str
    version: str
    kind: str
    born: float
    tokens: int
    history: str | None
    tensors: tuple[Tensor, ...] = ()


def write(path: Path, header: Header, tensors: Mapping[str, Array]) -> int:
    """Write a new record and return its bytes; `header.tensors` is filled in from `tensors`.

    Raises:
        OSError: when it cannot be written; what there is of it is no record.
    """
    specs = tuple(Tensor(name, x.dtype.str, x.shape) for name, x in tensors.items())
    text = json.dumps(dataclasses.asdict(dataclasses.replace(header, tensors=specs))).encode()
    digest = _DIGEST(text)
    parts: list[Any] = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in tensors.values() if x.size]
    for part in parts:
        digest.update(part)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
        for piece in (_PREFIX.pack(_MAGIC, digest.digest(), len(text)), text, *parts):
            _write_all(file, memoryview(piece))
        return file.tell()


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def read_header(path: Path) -> Header:
    """What a record says that it is; its digest is not looked at.

    Raises:
        OSError, ValueError: when it cannot be read, or is no whole record.
    """
    with open(path, "rb", buffering=0) as file:
        return _header(file)[0]


def read(path: Path) -> tuple[Header, dict[str, Array]]:
    """A record whose every byte is the one that was written, in memory of its own.

    Raises:
        OSError, ValueError: when it cannot be read, is no whole record, or was changed.
    """
    with open(path, "rb", buffering=0) as file:
        header, text, wanted = _header(file)
        digest, tensors = _DIGEST(text), {}
        for tensor in header.tensors:
            x = np.empty(tensor.shape, np.dtype(tensor.dtype))
            if x.size:
                data = x.reshape(-1).view(np.uint8).data
                if _read_all(file, data) < len(data):
                    raise ValueError("it ends early")
                digest.update(data)
            tensors[tensor.name] = x
    if digest.digest() != wanted:
        raise ValueError("its digest is another")
    return header, tensors


def _read_all(file: BinaryIO, data: memoryview) -> int:
    done = 0
    while done < len(data) and (n := file.readinto(data[done:])):  # type: ignore[attr-defined]
        done += n
    return done


def _header(file: BinaryIO) -> tuple[Header, bytes, bytes]:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise ValueError("it ends early")
    magic, digest, length = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > _LONGEST_HEADER:
        raise ValueError("it is no user state of this version")
    text = file.read(length)
    try:
        header: Header = typed_json.as_type(Header, typed_json.parse(text.decode()), "record")
        whole = _PREFIX.size + length + sum(t.nbytes for t in header.tensors) == os.fstat(file.fileno()).st_size
    except (TypeError, OverflowError, RecursionError) as e:
        raise ValueError("its header cannot be read") from e
    if not whole:
        raise ValueError("it has another size")
    return header, text, digest


class Names:
    """Digests of users and versions under a key that lies in the folder: files tell nobody who the users are.

    Args:
        key: 32 random bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, value: Hashable) -> str:
        """The digest of a user or a version, 40 hexadecimal digits; equal ones have equal digests."""
        h = hashlib.blake2b(key=self._key, digest_size=20)
        for part in _parts(value):
            h.update(struct.pack("<Q", len(part)))
            h.update(part)
        return h.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """A plain key (`stca.runtime.client_values.key_of`) as bytes, each with what it is."""
    match value:
        case tuple():
            yield b"tuple %d" % len(value)
            for part in value:
                yield from _parts(part)
        case str():
            yield b"text " + value.encode("utf-8", "surrogatepass")
        case bytes():
            yield b"bytes " + value
        case int():
            yield b"integer %x" % value
        case uuid.UUID():
            yield b"uuid " + value.bytes
        case datetime.datetime():
            same = value.replace(fold=0) if value.tzinfo is None else value.astimezone(datetime.UTC)
            yield b"time " + same.isoformat().encode()
        case _:
            yield f"{type(value).__name__} {value}".encode()
