# mypy: ignore-errors
# Triton's decorators and language carry no types; every caller of this module (launch, AOT, tests) is typed.
"""The operator's two kernels for SM 90 and many rows: one warp group copies tokens in bulk, two multiply them.

`attend_bulk_kernel` takes the whole blocks of each history, `finish_kernel` the tokens after the last whole block, and
joins all. The arguments are those of `kernels.py`, and so are rows, tiles, softmax and what is done with wrong offsets;
tile and history differ only in what follows.

**Why two.** Triton gives copies and products warps of their own (`warp_specialize`) in one loop only, without products
before or after it, a branch in it, or a return before it; a mask in it would lengthen each step by a fifth. A history
in parts needs a second launch anyway, so that one takes the rest. It does so before it waits for the first.

It refuses lists of segments, float32, heads other than 32, 64 or 128 and a `value` of another width than `key`:
`tiling.bulk_tiles` offers no tile.

**Copies.** A descriptor tells the copying unit where a tensor's rows lie: rows beyond the tensor are zeros. Each block
writes its descriptors into scratch memory, which Triton's launcher brings and TensorRT's does not: engines have
`kernels.py`. The interpreter copies the same rows without one.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from stca.plugins.kernels import (
    _LOWEST,
    _attend_tokens,
    _empty,
    _fold,
    _load_tile,
    _rows_of_segments,
    _rows_of_tile,
    _store_stats,
    _store_tile,
)


@triton.jit
def _tile_of_batch(
    target_offsets, history_offsets, history_lengths, n_targets, n_tokens, n_requests, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """This block's first row, how many rows are left from there, its history's first token and length; no rows, no
    tokens. A return is what this must do without."""
    held = n_requests > 0
    request, first_target, first_row, rows_left = _rows_of_tile(
        target_offsets, n_targets, n_requests, held, GROUP, BLOCK_M
    )
    first_token, length = _rows_of_segments(history_offsets, history_lengths, request, held, n_tokens)
    return first_target * GROUP + first_row, rows_left, first_token, tl.where(rows_left > 0, length, 0)


@triton.jit
def _widened(tile, UPCAST: tl.constexpr):
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit(do_not_specialize=["n_targets", "n_tokens", "n_requests"])
def attend_bulk_kernel(
    query,  # (N_t, HEADS, D)
    key,  # (N_h, KEY_HEADS, D)
    value,  # (N_h, KEY_HEADS, D_V)
    target_offsets,  # (B + 1,) int32
    history_offsets,  # (B + 1,) int32
    history_lengths,  # (B,) int32
    n_targets,  # N_t
    n_tokens,  # N_h
    n_requests,  # B
    out,  # (S, N_t, HEADS, D_V) float32, not yet divided by the sum
    stats,  # (S, N_t, HEADS, 2) float32, maximum (base 2) and sum
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """TILES tiles of rows against one part of the whole blocks of its history.

    Grid: `(N_t * GROUP // BLOCK_M + B, KEY_HEADS, S)`. Parts differ by one block at most. Every row of a part is
    written, a part without tokens as sum 0. Takes head sizes that are powers of two, in 16 bits.
    """
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    key_head, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    row, rows_left, first_token, length = _tile_of_batch(
        target_offsets, history_offsets, history_lengths, n_targets, n_tokens, n_requests, GROUP, BLOCK_M * TILES
    )
    each, more = length // BLOCK_N // parts, length // BLOCK_N % parts
    begin = first_token + (part * each + tl.minimum(part, more)) * BLOCK_N
    end = begin + (each + (part < more).to(tl.int32)) * BLOCK_N

    # No rows at all is nothing that a descriptor can say; then nothing is read through it.
    n_rows = n_targets * GROUP
    queries = tl.make_tensor_descriptor(query, [n_rows, KEY_HEADS * D], [KEY_HEADS * D, 1], [BLOCK_M, D])
    some = tl.maximum(n_tokens, 1)
    keys = tl.make_tensor_descriptor(key, [some, KEY_HEADS * D], [KEY_HEADS * D, 1], [BLOCK_N, D])
    values = tl.make_tensor_descriptor(value, [some, KEY_HEADS * D_V], [KEY_HEADS * D_V, 1], [BLOCK_N, D_V])
    q, states = (), ()
    for i in tl.static_range(TILES):
        q += (_widened(queries.load([row + i * BLOCK_M, key_head * D]), UPCAST),)
        states += (_empty(BLOCK_M, D_V),)
    for token in tl.range(begin, end, BLOCK_N, warp_specialize=True):
        k = _widened(keys.load([token, key_head * D]), UPCAST)
        folded = ()
        for i in tl.static_range(TILES):
            state, weights = _fold(states[i], tl.dot(q[i], k.T), BLOCK_N, 0.0, SCALE, BLOCK_N, False, False)
            if i == 0:
                v = values.load([token, key_head * D_V])
            acc = tl.dot(_widened(weights.to(v.dtype), UPCAST), _widened(v, UPCAST), state[0])
            folded += ((acc, state[1], state[2]),)
        states = folded

    for i in tl.static_range(TILES):
        acc, row_max, row_sum = states[i]
        # 64 bits for what grows with the batch; inside a tile 32 are enough.
        head_row = (part.to(tl.int64) * n_rows + row + i * BLOCK_M) * KEY_HEADS + key_head
        _store_stats(stats + head_row * 2, KEY_HEADS, row_max, row_sum, rows_left - i * BLOCK_M, BLOCK_M)
        _store_tile(out + head_row * D_V, KEY_HEADS * D_V, acc, rows_left - i * BLOCK_M, 0, BLOCK_M, D_V, D_V)


@triton.jit(do_not_specialize=["n_targets", "n_tokens", "n_requests", "n_parts"])
def finish_kernel(
    query,  # (N_t, HEADS, D)
    key,  # (N_h, KEY_HEADS, D)
    value,  # (N_h, KEY_HEADS, D_V)
    target_offsets,  # (B + 1,) int32
    history_offsets,  # (B + 1,) int32
    history_lengths,  # (B,) int32
    partial_out,  # (S, N_t, HEADS, D_V) float32
    partial_stats,  # (S, N_t, HEADS, 2) float32
    n_targets,  # N_t
    n_tokens,  # N_h
    n_requests,  # B
    n_parts,  # S
    out,  # (N_t, HEADS, D_V)
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention over the tokens after the last block of `WHOLE`, joined with the parts, divided by the common sum.

    Grid: `(N_t * GROUP // BLOCK_M + B, KEY_HEADS)`. `BLOCK_S` parts are in flight at a time. On a GPU it may begin
    before the parts are written: it waits for them where it needs them.
    """
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    key_head = tl.program_id(1)
    row, rows_left, first_token, length = _tile_of_batch(
        target_offsets, history_offsets, history_lengths, n_targets, n_tokens, n_requests, GROUP, BLOCK_M
    )
    head_row = row.to(tl.int64) * KEY_HEADS + key_head
    q = _load_tile(query + head_row * D, KEY_HEADS * D, rows_left, 0, BLOCK_M, D, D, True, UPCAST)
    state = _empty(BLOCK_M, D_V)
    for token in range(length // WHOLE * WHOLE, length, BLOCK_N):
        token_row = (first_token + token).to(tl.int64) * KEY_HEADS + key_head
        state = _attend_tokens(
            state, q, q, rows_left, key + token_row * D, value + token_row * D_V, 0, length - token, 0.0,
            SCALE, KEY_HEADS, D, D_V, BLOCK_M, BLOCK_N, D, D_V, False, False, True, UPCAST,
        )  # fmt: skip

    acc, row_max, row_sum = state
    if not UPCAST:
        gdc_wait()
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D_V)
    for first in range(0, n_parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        held = (part < n_parts)[:, None] & (rows < rows_left)[None, :]
        part_row = part.to(tl.int64)[:, None] * (n_targets * HEADS) + head_row + (rows * KEY_HEADS)[None, :]
        part_max = tl.load(partial_stats + part_row * 2, mask=held, other=_LOWEST)
        part_sum = tl.load(partial_stats + part_row * 2 + 1, mask=held, other=0.0)
        pointers = partial_out + part_row[:, :, None] * D_V + columns[None, None, :]
        part_out = tl.load(pointers, mask=held[:, :, None], other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        rescale = tl.exp2(row_max - new_max)
        part_rescale = tl.exp2(part_max - new_max[None, :])
        acc = acc * rescale[:, None] + tl.sum(part_out * part_rescale[:, :, None], 0)
        row_sum = row_sum * rescale + tl.sum(part_sum * part_rescale, 0)
        row_max = new_max
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    _store_tile(out + head_row * D_V, KEY_HEADS * D_V, acc, rows_left, 0, BLOCK_M, D_V, D_V)
