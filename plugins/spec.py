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
# TensorRT alone knows these: the operator where key and value are one tensor, and cut into two kernels in a row; and,
# as a plugin has so many inputs and no other number, over lists of segments.
TENSORRT_TIED: Final = f"{OP_NAME}Tied"
TENSORRT_PARTS: Final = f"{OP_NAME}Parts"
TENSORRT_JOIN: Final = f"{OP_NAME}Join"
TENSORRT_SEGMENTS: Final = f"{OP_NAME}Segments"
TENSORRT_SEGMENTS_PARTS: Final = f"{OP_NAME}SegmentsParts"


@dataclass(frozen=True)
class Argument:
    """One tensor that the operator takes or gives.

    Attributes:
        name: the same in every implementation.
        shape: sizes by name: `N_t` targets, `N_h` history tokens, `B` requests, `N_s` segments (one a request, so `B`,
            unless `segment_offsets` says otherwise), `H` heads, `H_k` heads of key and value (1 or `H`), `D` and `D_v`
            head sizes.
        kind: `values`, one floating-point type for all such arguments; `structure`, int32; `logits`, float32.
        text: what it is, for schemas and documentation.
        optional: whether a request may have more segments than one by it; such arguments come last.
    """

    name: str
    shape: tuple[str, ...]
    kind: Literal["values", "structure", "logits"]
    text: str
    optional: bool = False


# The tensors in the order in which every implementation takes them. Scales of quantized keys and values would follow.
#
# A segment is a run of rows of key and value. By `segment_offsets` a request reads a list of them in one softmax, each
# with a bias on its logits: its own state beside other users', or the pages of a pool `(pages, page, H_k, D)`, whose
# rows are those of the pool seen as `(pages * page, H_k, D)`. A list's segments may lie anywhere, in any order, twice.
ARGUMENTS: Final = (
    Argument("query", ("N_t", "H", "D"), "values", "packed targets"),
    Argument("key", ("N_h", "H_k", "D"), "values", "packed history; H_k is 1 (absorbed) or H (projected)"),
    Argument("value", ("N_h", "H_k", "D_v"), "values", "packed history, as the key"),
    Argument("target_offsets", ("B + 1",), "structure", "where each request's targets begin; the last entry is N_t"),
    Argument("history_offsets", ("N_s + 1",), "structure", "where each segment begins; the last entry is N_h"),
    Argument("history_lengths", ("N_s",), "structure", "tokens used from the start of each segment"),
    Argument("segment_offsets", ("B + 1",), "structure", "where each request's segments begin; the last is N_s", True),
    Argument("segment_bias", ("N_s",), "logits", "finite, added to the logits of a segment's tokens", True),
)
# What a request with one segment needs.
PLAIN: Final = tuple(a for a in ARGUMENTS if not a.optional)
RESULT: Final = Argument("out", ("N_t", "H", "D_v"), "values", "of the query's type; zeros where a history is empty")
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
    segment_offsets: Sequence[int] | None = None,
    segment_bias: Sequence[int] | None = None,
) -> None:
    """Check the operator's static contract on shapes alone, which are those of `ARGUMENTS`; None is left out.

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
        if offsets[0] == 1 and rows[0] != 0 and (name == "target_offsets" or segment_offsets is None):
            raise ValueError(f"{QUALIFIED_NAME}: {name} has 1 entry, so no request, for {rows[0]} rows; expected none")
    _check_segments(target_offsets, history_offsets, segment_offsets, segment_bias)
    segments = history_offsets[0] - 1
    for name, given in (("history_lengths", history_lengths), ("segment_bias", segment_bias)):
        if given is not None and tuple(given) != (segments,):
            raise ValueError(f"{QUALIFIED_NAME}: {name} has shape {tuple(given)}, expected {(segments,)}")


def _check_segments(
    target_offsets: Sequence[int],
    history_offsets: Sequence[int],
    segment_offsets: Sequence[int] | None,
    segment_bias: Sequence[int] | None,
) -> None:
    if segment_offsets is not None:
        if tuple(segment_offsets) != tuple(target_offsets):
            shapes = f"{tuple(segment_offsets)}, target_offsets {tuple(target_offsets)}"
            raise ValueError(f"{QUALIFIED_NAME}: segment_offsets has shape {shapes}; both need batch + 1 entries")
    elif segment_bias is not None:
        raise ValueError(f"{QUALIFIED_NAME}: segment_bias needs segment_offsets, which says whose the segments are")
    elif target_offsets[0] != history_offsets[0]:
        raise ValueError(
            f"{QUALIFIED_NAME}: target_offsets has {target_offsets[0]} entries, history_offsets {history_offsets[0]}; "
            "both need batch + 1"
        )


def check_offsets(
    target_offsets: Sequence[int],
    history_offsets: Sequence[int],
    history_lengths: Sequence[int],
    n_targets: int,
    n_tokens: int,
    segment_offsets: Sequence[int] | None = None,
) -> None:
    """Check the values that say which rows belong to which request; their number is checked by `check_shapes`.

    Raises:
        ValueError: naming the entry, its value and what is expected.
    """
    packed = [("target_offsets", target_offsets, n_targets, "N_t")]
    if segment_offsets is None:
        packed.append(("history_offsets", history_offsets, n_tokens, "N_h"))
    else:
        packed.append(("segment_offsets", segment_offsets, len(history_lengths), "N_s"))
    for name, offsets, rows, count in packed:
        if offsets[0] != 0:
            raise ValueError(f"{QUALIFIED_NAME}: {name}[0] is {offsets[0]}, expected 0")
        for i, (begin, end) in enumerate(pairwise(offsets)):
            if end < begin:
                raise ValueError(f"{QUALIFIED_NAME}: {name}[{i + 1}] is {end}, expected at least {name}[{i}] = {begin}")
        if offsets[-1] != rows:
            last = len(offsets) - 1
            raise ValueError(f"{QUALIFIED_NAME}: {name}[{last}], the last, is {offsets[-1]}, expected {count} = {rows}")
    if history_offsets[-1] != n_tokens:
        last = len(history_offsets) - 1
        raise ValueError(
            f"{QUALIFIED_NAME}: history_offsets[{last}] is {history_offsets[-1]}, expected N_h = {n_tokens}"
        )
    ends = history_offsets[1:] if segment_offsets is None else [n_tokens] * len(history_lengths)
    for i, (begin, end, length) in enumerate(zip(history_offsets, ends, history_lengths, strict=False)):
        if not 0 <= begin <= n_tokens:
            raise ValueError(f"{QUALIFIED_NAME}: history_offsets[{i}] is {begin}, expected 0 to N_h = {n_tokens}")
        if not 0 <= length <= end - begin:
            raise ValueError(
                f"{QUALIFIED_NAME}: history_lengths[{i}] is {length}, expected 0 to {end - begin}, the tokens of its "
                "segment"
            )
