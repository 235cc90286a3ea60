"""Name, version and argument contract of `stca::TargetHistoryAttention`, shared by all of its implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

DOMAIN: Final = "stca"
OP_NAME: Final = "TargetHistoryAttention"
OP_VERSION: Final = 1
QUALIFIED_NAME: Final = f"{DOMAIN}::{OP_NAME}"
# TensorRT alone knows these: the operator where key and value are one tensor, and cut into two kernels in a row.
TENSORRT_TIED: Final = f"{OP_NAME}Tied"
TENSORRT_PARTS: Final = f"{OP_NAME}Parts"
TENSORRT_JOIN: Final = f"{OP_NAME}Join"


@dataclass(frozen=True)
class Argument:
    """One tensor that the operator takes or gives.

    Attributes:
        name: the same in every implementation.
        shape: sizes by name: `N_t` targets, `N_h` history tokens, `B` requests, `H` heads, `H_k` heads of key and value
            (1 or `H`), `D` and `D_v` head sizes.
        kind: `values`, one floating-point type for all such arguments, or `structure`, int32.
        text: what it is, for schemas and documentation.
    """

    name: str
    shape: tuple[str, ...]
    kind: Literal["values", "structure"]
    text: str


# The tensors in the order in which every implementation takes them. A block table (pages instead of contiguous
# segments), scales of quantized keys and values and a bias per history token would follow `history_lengths`.
ARGUMENTS: Final = (
    Argument("query", ("N_t", "H", "D"), "values", "packed targets"),
    Argument("key", ("N_h", "H_k", "D"), "values", "packed history; H_k is 1 (absorbed) or H (projected)"),
    Argument("value", ("N_h", "H_k", "D_v"), "values", "packed history, as the key"),
    Argument("target_offsets", ("B + 1",), "structure", "where each request's targets begin; the last entry is N_t"),
    Argument("history_offsets", ("B + 1",), "structure", "where each request's history begins; the last entry is N_h"),
    Argument("history_lengths", ("B",), "structure", "tokens used from the start of each segment"),
)
RESULT: Final = Argument("out", ("N_t", "H", "D_v"), "values", "of the query's type; zeros where a history is empty")
STRUCTURE: Final = tuple(a.name for a in ARGUMENTS if a.kind == "structure")
# The attribute: a factor on the logits.
SCALE: Final = "scale"
# Types of `values`, as ONNX names them; float64 besides in torch on a CPU, for references and gradients.
VALUE_TYPES: Final = ("float", "float16", "bfloat16")


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
    for argument, shape in zip(ARGUMENTS, (query, key, value, target_offsets, history_offsets), strict=False):
        if len(shape) != (rank := len(argument.shape)):
            raise ValueError(f"{QUALIFIED_NAME}: {argument.name} has rank {len(shape)}, expected {rank}")
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
