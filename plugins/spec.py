"""Name, version and argument contract of `stca::TargetHistoryAttention`, shared by all of its implementations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

DOMAIN: Final = "stca"
OP_NAME: Final = "TargetHistoryAttention"
OP_VERSION: Final = 1
QUALIFIED_NAME: Final = f"{DOMAIN}::{OP_NAME}"
# TensorRT alone knows these: the operator where key and value are one tensor, and cut into two kernels in a row.
TENSORRT_TIED: Final = f"{OP_NAME}Tied"
TENSORRT_PARTS: Final = f"{OP_NAME}Parts"
TENSORRT_JOIN: Final = f"{OP_NAME}Join"


def check_shapes(
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    target_offsets: Sequence[int],
    history_offsets: Sequence[int],
    history_lengths: Sequence[int] | None,
) -> None:
    """Check the operator's static contract on shapes alone.

    Shapes: `query (N_t, H, D)`, `key (N_h, H_k, D)`, `value (N_h, H_k, D_v)`, offsets `(B + 1,)`, lengths `(B,)`,
    with `H_k` either 1 (absorbed) or `H` (projected).

    Raises:
        ValueError: naming the argument, its shape and what is expected.
    """
    for name, shape, rank in (
        ("query", query, 3),
        ("key", key, 3),
        ("value", value, 3),
        ("target_offsets", target_offsets, 1),
        ("history_offsets", history_offsets, 1),
    ):
        if len(shape) != rank:
            raise ValueError(f"{QUALIFIED_NAME}: {name} has rank {len(shape)}, expected {rank}")
    if key[2] != query[2]:
        raise ValueError(f"{QUALIFIED_NAME}: key has head size {key[2]}, query has {query[2]}; they must be equal")
    if key[0] != value[0] or key[1] != value[1]:
        raise ValueError(f"{QUALIFIED_NAME}: key {tuple(key)} and value {tuple(value)} differ in tokens or heads")
    if key[1] not in (1, query[1]):
        raise ValueError(
            f"{QUALIFIED_NAME}: key has {key[1]} heads; expected 1 (absorbed) or the query's {query[1]} (projected)"
        )
    for name, offsets, rows in (("target_offsets", target_offsets, query), ("history_offsets", history_offsets, key)):
        if offsets[0] == 0:
            raise ValueError(f"{QUALIFIED_NAME}: {name} has 0 entries; expected batch + 1, at least 1")
        if offsets[0] == 1 and rows[0] != 0:
            raise ValueError(f"{QUALIFIED_NAME}: {name} has 1 entry, so no request, for {rows[0]} rows; expected none")
    if target_offsets[0] != history_offsets[0]:
        raise ValueError(
            f"{QUALIFIED_NAME}: target_offsets has {target_offsets[0]} entries, history_offsets {history_offsets[0]}; "
            "both need batch + 1"
        )
    if history_lengths is not None and (len(history_lengths) != 1 or history_lengths[0] != history_offsets[0] - 1):
        expected = (history_offsets[0] - 1,)
        raise ValueError(f"{QUALIFIED_NAME}: history_lengths has shape {tuple(history_lengths)}, expected {expected}")


def check_offsets(
    target_offsets: Sequence[int],
    history_offsets: Sequence[int],
    history_lengths: Sequence[int],
    n_targets: int,
    n_tokens: int,
) -> None:
    """Check the values that say which rows belong to which request; their number is checked by `check_shapes`.

    Raises:
        ValueError: naming the entry, its value and what is expected.
    """
    for name, offsets, rows, count in (
        ("target_offsets", target_offsets, n_targets, "N_t"),
        ("history_offsets", history_offsets, n_tokens, "N_h"),
    ):
        if offsets[0] != 0:
            raise ValueError(f"{QUALIFIED_NAME}: {name}[0] is {offsets[0]}, expected 0")
        for i, (begin, end) in enumerate(pairwise(offsets)):
            if end < begin:
                raise ValueError(f"{QUALIFIED_NAME}: {name}[{i + 1}] is {end}, expected at least {name}[{i}] = {begin}")
        if offsets[-1] != rows:
            last = len(offsets) - 1
            raise ValueError(f"{QUALIFIED_NAME}: {name}[{last}], the last, is {offsets[-1]}, expected {count} = {rows}")
    for i, length in enumerate(history_lengths):
        held = history_offsets[i + 1] - history_offsets[i]
        if not 0 <= length <= held:
            raise ValueError(
                f"{QUALIFIED_NAME}: history_lengths[{i}] is {length}, expected 0 to {held}, the tokens of its segment"
            )
