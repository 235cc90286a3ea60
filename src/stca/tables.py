"""Embedding tables on disk: rows in a file that is mapped, never read whole, and the digests of its blocks.

A table has too many bytes to digest at each load. So the bundle pins a file of digests, one for each block of rows, and
a block is held against its digest when a row of it is first looked up. A table small enough is checked at load.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from stca.arrays import Array
from stca.errors import BundleError, RequestError
from stca.specs import FLOAT8, TableSpec, table_row_bytes

# Rows of a block have about as many bytes: little enough to be checked within a request, enough for few digests.
BLOCK_BYTES: Final = 1 << 20
# Tables up to this size are checked as a whole at load.
CHECKED_AT_LOAD: Final = 1 << 30
DIGEST_BYTES: Final = 32
# How rows lie in memory; numpy has no bfloat16, whose bits are the upper half of a float32's. Rows of 8-bit numbers are
# bytes: the numbers', and four of a scale.
_STORED: Final[Mapping[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def _e4m3() -> Array:
    """The number of each byte (OCP 8-bit floating point, E4M3): 4 bits of exponent, of bias 7, and 3 of mantissa."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, (byte & 7) / 8
    size = np.where(exponent > 0, np.ldexp(1 + mantissa, exponent - 7), np.ldexp(mantissa, -6))
    size[byte & 127 == 127] = np.nan
    made: Array = np.where(byte > 127, -size, size).astype(np.float32)
    return made


# The float32 of each byte of a row.
_LEVELS: Final = {"int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32), FLOAT8: _e4m3()}


def write_table(folder: Path, stem: str, name: str, rows: int, width: int, dtype: str, read: Reader) -> TableSpec:
    """Write a table and its digests, a block at a time; blocks of zeros take no space on the disk.

    Args:
        folder: where to. stem: of the two files' names.
        name: of the weight. rows, width, dtype: of the table.
        read: gives rows `[begin, end)` as they are kept: `(end - begin, width)` in a dtype of as many bytes or, of
            8-bit numbers and their scale, `(end - begin, row_bytes)` uint8.
    """
    row_bytes = table_row_bytes(width, dtype)
    block_rows = 1 << max(0, (BLOCK_BYTES // row_bytes).bit_length() - 1)
    spec = TableSpec(name, f"{stem}.rows", f"{stem}.digests", dtype, rows, width, block_rows)
    zeros = hashlib.sha256(bytes(block_rows * row_bytes)).digest()
    with (folder / spec.file).open("wb") as f, (folder / spec.digests).open("wb") as digests:
        f.truncate(spec.bytes)
        for begin in range(0, rows, block_rows):
            end = min(begin + block_rows, rows)
            block = np.ascontiguousarray(read(begin, end)).view(np.uint8)
            if block.any():
                f.seek(begin * row_bytes)
                f.write(block.data)
            whole_of_zeros = end - begin == block_rows and not block.any()
            digests.write(zeros if whole_of_zeros else hashlib.sha256(block.data).digest())
    return spec


Reader = Callable[[int, int], Array]


class TableFile:
    """A table of a bundle, mapped. Safe to share between threads.

    Args:
        root: directory of the bundle.
        spec: of the table.

    Raises:
        BundleError: when a file is missing or of another size.
    """

    def __init__(self, root: Path, spec: TableSpec) -> None:
        self.spec, self._root = spec, root
        for name, size in ((spec.file, spec.bytes), (spec.digests, spec.blocks * DIGEST_BYTES)):
            self._require_size(name, size, (root / name).stat().st_size if (root / name).is_file() else None)
        stored = _STORED.get(spec.dtype, np.dtype("u1"))
        self._file, self._reading = (root / spec.file).open("rb", buffering=0), threading.Lock()
        self._rows: Array = np.memmap(self._file, stored, "r", 0, (spec.rows, spec.row_bytes // stored.itemsize))
        self._digests = (root / spec.digests).read_bytes()
        self._shift = spec.block_rows.bit_length() - 1
        self._unchecked = np.ones(spec.blocks, bool)
        self._left = spec.bytes > CHECKED_AT_LOAD  # a smaller one was checked when its bundle was loaded

    def rows(self, ids: Array) -> Array:
        """Rows `(n, width)`, float32.

        Args:
            ids: `(n,)` integers in `[0, rows)`.

        Raises:
            BundleError: when the file has another size now, or a block of it is not what it was, naming the table.
        """
        # The system ends a process that looks behind the end of a mapped file.
        self._require_size(self.spec.file, self.spec.bytes, os.fstat(self._file.fileno()).st_size)
        if self._left:
            self._check(ids)
        # Clipped, because `take` copies twice where it has to look out for wrong indices.
        found: Array = np.take(self._rows, ids, axis=0, mode="clip")
        if (levels := _LEVELS.get(self.spec.dtype)) is not None:
            numbers, scale = found[:, : self.spec.width], found[:, self.spec.width :].copy().view("<f4")
            found = np.take(levels, numbers)
            found *= scale
            return found
        if self.spec.dtype == "bfloat16":
            found = np.left_shift(found, 16, dtype=np.uint32).view(np.float32)
        return found.astype(np.float32, copy=False)

    def _require_size(self, name: str, size: int, found: int | None) -> None:
        if found != size:
            has = "is no plain file" if found is None else f"has {found} bytes"
            raise BundleError(f"{self._root}: {name} {has}, table {self.spec.name!r} needs {size}; copy it again")

    def _check(self, ids: Array) -> None:
        blocks = ids >> self._shift
        fresh = self._unchecked[blocks]
        if not fresh.any():
            return
        for block in np.unique(blocks[fresh]).tolist():
            self.check_block(block)
            self._unchecked[block] = False
        self._left = bool(self._unchecked.any())

    def check_block(self, block: int) -> None:
        """Hold a block against its digest.

        Raises:
            BundleError: when it differs.
        """
        spec, begin = self.spec, block * self.spec.block_rows
        end = min(begin + spec.block_rows, spec.rows)
        # Read and not looked at in the map: whole blocks would count as this process's memory ever after.
        with self._reading:
            self._file.seek(begin * spec.row_bytes)
            found = self._file.read((end - begin) * spec.row_bytes)
        if hashlib.sha256(found).digest() != self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            raise BundleError(
                f"{self._root}: {spec.file} was changed: block {block} of table {spec.name!r}, rows {begin} to "
                f"{end - 1}; copy it again"
            )

    def check(self) -> None:
        """Hold every block against its digest.

        Raises:
            BundleError: naming the first that differs.
        """
        for block in range(self.spec.blocks):
            self.check_block(block)


def row_numbers(spec: TableSpec, ids: Array) -> Array:
    """Ids as row numbers: negative ones count from the end, as in ONNX.

    Returns:
        `(n,)` int64.

    Raises:
        RequestError: naming the first id that is no row.
    """
    flat: Array = ids.reshape(-1).astype(np.int64, copy=False)
    if not flat.size:
        return flat
    low, high = int(flat.min()), int(flat.max())
    if low < -spec.rows or high >= spec.rows:
        wrong = flat[(flat < -spec.rows) | (flat >= spec.rows)][0]
        raise RequestError(
            f"table {spec.name!r}: is asked for row {wrong}; it must be in [{-spec.rows}, {spec.rows - 1}]"
        )
    return np.where(flat < 0, flat + spec.rows, flat) if low < 0 else flat
