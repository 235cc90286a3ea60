# mypy: ignore-errors
# Triton's decorators and language carry no types; every caller of this module (launch, AOT, tests) is typed.
"""The operator's two Triton kernels: `attend_kernel` and, when the history is split across blocks, `combine_kernel`.

One source serves CUDA from torch, the ahead-of-time TensorRT plugins and Triton's interpreter, so the arguments follow
TensorRT's order: tensor inputs, int32 scalars, tensor outputs, then compile-time constants. Grids need shapes only;
where a ragged request begins is looked up on the device. There is no workspace and no atomic.

**Rows.** A key head serves `GROUP = HEADS / KEY_HEADS` query heads. The rows of a tile are the (target, head) pairs
that read that key head: in the absorbed form (`KEY_HEADS = 1`) the `H` heads of several targets stacked, so that few
targets still fill a tile and a token is read once for all heads; in the projected form (`KEY_HEADS = H`) the targets of
one head. Row `r` of a request is `r * KEY_HEADS` heads after the request's first, in both forms.

**Tiles of a ragged batch.** Request `b` owns tiles `start(b) … start(b + 1) - 1`, with
`start(b) = target_offsets[b] * GROUP // BLOCK_M + b`. A request of `n` rows gets at least `ceil(n / BLOCK_M)` of them
wherever it begins, so the grid is `N_t * GROUP // BLOCK_M + B` blocks: known from shapes, at most one idle block a
request, no prefix sum.

**Lists of segments.** With `segment_offsets` a request reads several runs of rows in one softmax: other users' states,
or pages of a pool, each where it lies. A part of the history is then a range of the list's blocks, each of one segment.
What is added to a segment's logits shifts the maximum of a block alone, so no logit pays for it.

**Softmax.** Running maximum and sum in float32, base 2 with `log2(e)` folded into the scale. The maximum starts at a
large finite number instead of -inf, so that nothing here ever computes `inf - inf`: an empty history has sum 0 and
gives zeros. Products of float32 inputs are true float32 products, never TF32.

**Offsets.** A host cannot look at values on the GPU without waiting for them, so nobody has checked these. Whatever is
read from them is brought into bounds: wrong ones give wrong numbers, but touch no memory beyond the tensors.
"""

import triton
import triton.language as tl

# Kernels may read a module global only when it is a constexpr.
_LOWEST = tl.constexpr(-1.0e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SEARCH = tl.constexpr(128)


@triton.jit
def _within(x, least, most):
    return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def _request_of_tile(target_offsets, n_requests, tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request a tile belongs to: how many of the requests after the first start at or before the tile.

    A count over a block of offsets is one round trip to memory where a binary search would be one a step, and a batch
    of one request needs none.
    """
    request = 0
    for first in range(1, n_requests, _SEARCH):
        b = first + tl.arange(0, _SEARCH)
        begin = tl.load(target_offsets + b, mask=b < n_requests, other=0)
        started = (b < n_requests) & (begin * GROUP // BLOCK_M + b <= tile)
        request += tl.sum(started.to(tl.int32), 0)
    return request


@triton.jit
def _rows_of_tile(target_offsets, n_targets, n_requests, held, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request of this block's tile, the request's first target, the tile's first row of the request, and how many
    rows are left from there. Without requests there are no offsets to read, and nothing is `held`."""
    tile = tl.program_id(0)
    request = _request_of_tile(target_offsets, n_requests, tile, GROUP, BLOCK_M)
    first_target = _within(tl.load(target_offsets + request, mask=held, other=0), 0, n_targets)
    next_target = _within(tl.load(target_offsets + request + 1, mask=held, other=0), first_target, n_targets)
    n_rows = (next_target - first_target) * GROUP
    tile_of_request = tile - first_target * GROUP // BLOCK_M - request
    first_row = _within(tile_of_request, 0, tl.cdiv(n_rows, BLOCK_M)) * BLOCK_M
    return request, first_target, first_row, n_rows - first_row


@triton.jit
def _load_tile(
    base, row_stride: tl.constexpr, rows_left, first_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile `(ROWS, COLUMNS)` of consecutive rows; zero beyond `rows_left` and beyond `WIDTH` columns.

    Every key and value passes through here: quantized tokens would be widened and scaled before the return.
    """
    rows = tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if CHECK_ROWS and WIDTH % COLUMNS != 0:
        tile = tl.load(pointers, mask=(rows[:, None] < rows_left) & (columns[None, :] < WIDTH), other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows[:, None] < rows_left, other=0.0)
    elif WIDTH % COLUMNS != 0:
        tile = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_tile(
    base, row_stride: tl.constexpr, tile, rows_left, first_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a tile `(ROWS, COLUMNS)` of consecutive rows: `rows_left` of them, columns before `WIDTH`."""
    rows = tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    stored = (rows[:, None] < rows_left) & (columns[None, :] < WIDTH)
    tl.store(base + rows[:, None] * row_stride + columns[None, :], tile.to(base.dtype.element_ty), mask=stored)


@triton.jit
def _store_stats(base, row_stride: tl.constexpr, row_max, row_sum, rows_left, ROWS: tl.constexpr):
    """Store maximum and sum of `rows_left` rows, next to each other."""
    rows = tl.arange(0, ROWS)
    tl.store(base + rows * (2 * row_stride), row_max, mask=rows < rows_left)
    tl.store(base + rows * (2 * row_stride) + 1, row_sum, mask=rows < rows_left)


@triton.jit
def _empty(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """A running softmax over no tokens: the sum of values, and each row's maximum (base 2) and sum of weights."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    return acc, tl.full([BLOCK_M], _LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def _fold(
    state, logits, tokens_left, bias,
    SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BIASED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A running softmax over `BLOCK_N` more logits, in the `LAST` block `tokens_left`: what was summed before, brought
    to the new maximum, and the logits' weights. BIASED adds `bias`, base 2, to each logit."""
    acc, row_max, row_sum = state
    # exp2(logit * factor - max) is one fused multiply-add and one exp2, for which the factor must be positive.
    if SCALE > 0.0:
        factor: tl.constexpr = SCALE * _LOG2_E
    else:
        logits *= SCALE
        factor: tl.constexpr = _LOG2_E
    if LAST:
        logits = tl.where(tl.arange(0, BLOCK_N)[None, :] < tokens_left, logits, float("-inf"))
    if BIASED:
        new_max = tl.maximum(row_max, tl.max(logits, 1) * factor + bias)
        weights = tl.exp2(logits * factor - (new_max - bias)[:, None])
    else:
        new_max = tl.maximum(row_max, tl.max(logits, 1) * factor)
        weights = tl.exp2(logits * factor - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    return (acc * rescale[:, None], new_max, row_sum), weights


@triton.jit
def _attend_tokens(
    state, query_tile, query_base, rows_left, key_base, value_base, first_value_column, tokens_left, bias,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TIED: tl.constexpr, BIASED: tl.constexpr, LAST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold `BLOCK_N` tokens into the running softmax; in the `LAST` block only `tokens_left` of them exist."""
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in tl.static_range(0, D, BLOCK_D):
        # The first chunk stays in registers over the whole loop; a wide head's others come from the cache each time.
        if chunk == 0:
            q = query_tile
        else:
            q = _load_tile(query_base, KEY_HEADS * D, rows_left, chunk, BLOCK_M, BLOCK_D, D, True, UPCAST)
        k = _load_tile(key_base, KEY_HEADS * D, tokens_left, chunk, BLOCK_N, BLOCK_D, D, LAST, UPCAST)
        logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
    state, weights = _fold(state, logits, tokens_left, bias, SCALE, BLOCK_N, BIASED, LAST)
    if TIED:
        v = k
    else:
        v = _load_tile(
            value_base, KEY_HEADS * D_V, tokens_left, first_value_column, BLOCK_N, BLOCK_DV, D_V, LAST, UPCAST
        )
    weights = weights.to(value_base.dtype.element_ty)
    if UPCAST:
        weights = weights.to(tl.float32)
    return tl.dot(weights, v, state[0], input_precision="ieee"), state[1], state[2]


@triton.jit
def _attend_segment(
    state, query_tile, query_base, rows_left, key, value, key_head, first_token, first_value_column, begin, end, bias,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TIED: tl.constexpr, BIASED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold tokens `begin` to `end` of the segment at row `first_token`; whole blocks first, then what is left."""
    # 64-bit offsets for everything that grows with the batch; inside a tile 32 bits are enough.
    key_base = key + (first_token.to(tl.int64) * KEY_HEADS + key_head) * D
    value_base = value + (first_token.to(tl.int64) * KEY_HEADS + key_head) * D_V
    end_of_whole_blocks = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
    for token in range(begin, end_of_whole_blocks, BLOCK_N):
        state = _attend_tokens(
            state, query_tile, query_base, rows_left,
            key_base + tl.cast(token, tl.int64) * (KEY_HEADS * D),
            value_base + tl.cast(token, tl.int64) * (KEY_HEADS * D_V),
            first_value_column, BLOCK_N, bias,
            SCALE, KEY_HEADS, D, D_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, TIED, BIASED, False, UPCAST,
        )  # fmt: skip
    if end_of_whole_blocks < end:
        last = end_of_whole_blocks.to(tl.int64)
        state = _attend_tokens(
            state, query_tile, query_base, rows_left,
            key_base + last * (KEY_HEADS * D), value_base + last * (KEY_HEADS * D_V),
            first_value_column, end - end_of_whole_blocks, bias,
            SCALE, KEY_HEADS, D, D_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, TIED, BIASED, True, UPCAST,
        )  # fmt: skip
    return state


@triton.jit
def _rows_of_segments(history_offsets, history_lengths, segment, listed, n_tokens):
    """First row and length, in bounds, of those segments that are `listed`; else nothing."""
    first_token = _within(tl.load(history_offsets + segment, mask=listed, other=0), 0, n_tokens)
    length = tl.load(history_lengths + segment, mask=listed, other=0)
    return first_token, _within(length, 0, n_tokens - first_token)


@triton.jit
def _part_of_list(history_offsets, history_lengths, first, last, n_tokens, split, parts, BLOCK_N: tl.constexpr):
    """The part `split` of the blocks of segments `first` to `last`: the segment it begins in, how many blocks of the
    list lie before that segment, and the blocks at which the part begins and ends."""
    count = 0
    for at in range(first, last, _SEARCH):
        segment = at + tl.arange(0, _SEARCH)
        _, length = _rows_of_segments(history_offsets, history_lengths, segment, segment < last, n_tokens)
        count += tl.sum(tl.cdiv(length, BLOCK_N), 0)
    blocks_a_part = tl.cdiv(count, parts)
    begin = split * blocks_a_part
    before, passed, held = 0, 0, first
    for at in range(first, last, _SEARCH):
        segment = at + tl.arange(0, _SEARCH)
        _, length = _rows_of_segments(history_offsets, history_lengths, segment, segment < last, n_tokens)
        blocks = tl.cdiv(length, BLOCK_N)
        over = (segment < last) & (passed + tl.cumsum(blocks, 0) <= begin)
        held += tl.sum(over.to(tl.int32), 0)
        before += tl.sum(tl.where(over, blocks, 0), 0)
        passed += tl.sum(blocks, 0)
    return held, before, begin, tl.minimum(begin + blocks_a_part, count)


@triton.jit
def _attend_list(
    state, query_tile, query_base, rows_left, key, value, key_head, first_value_column, request,
    history_offsets, history_lengths, segment_offsets, segment_bias, n_tokens, n_segments,
    SCALE: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, TIED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold this block's part of a request's list of segments; also whether the part has any tokens."""
    segment = _within(tl.load(segment_offsets + request), 0, n_segments)
    last = _within(tl.load(segment_offsets + request + 1), segment, n_segments)
    before, begin, end = 0, 0, 2**31 - 1
    if SPLIT:
        segment, before, begin, end = _part_of_list(
            history_offsets, history_lengths, segment, last, n_tokens, tl.program_id(2), tl.num_programs(2), BLOCK_N
        )
    while (segment < last) & (before < end):
        first_token, length = _rows_of_segments(history_offsets, history_lengths, segment, True, n_tokens)
        blocks = tl.cdiv(length, BLOCK_N)
        first_block = _within(begin - before, 0, blocks)
        end_of_segment = tl.minimum(_within(end - before, 0, blocks) * BLOCK_N, length)
        bias = tl.load(segment_bias + segment) * _LOG2_E
        state = _attend_segment(
            state, query_tile, query_base, rows_left, key, value, key_head,
            first_token, first_value_column, first_block * BLOCK_N, end_of_segment, bias,
            SCALE, KEY_HEADS, D, D_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, TIED, True, UPCAST,
        )  # fmt: skip
        before += blocks
        segment += 1
    return state, begin < end


# Sizes differ from request to request. Triton compiles anew for a size of 1 and for multiples of 16 unless told not to,
# and a live server must not wait for a compiler.
@triton.jit(do_not_specialize=["n_targets", "n_tokens", "n_requests", "n_segments"])
def attend_kernel(
    query,  # (N_t, HEADS, D)
    key,  # (N_h, KEY_HEADS, D)
    value,  # (N_h, KEY_HEADS, D_V)
    target_offsets,  # (B + 1,) int32
    history_offsets,  # (N_s + 1,) int32
    history_lengths,  # (N_s,) int32
    segment_offsets,  # (B + 1,) int32; None where request b has segment b, as the next
    segment_bias,  # (N_s,) float32
    n_targets,  # N_t
    n_tokens,  # N_h
    n_requests,  # B
    n_segments,  # N_s; None without `segment_offsets`
    out,  # (N_t, HEADS, D_V) of the inputs' type; SPLIT: (S, N_t, HEADS, D_V) float32, not yet divided by the sum
    stats,  # SPLIT only, else None: (S, N_t, HEADS, 2) float32, maximum (base 2) and sum
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr,
    TIED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of one tile of rows over one part of its history.

    Grid: `(N_t * GROUP // BLOCK_M + B, KEY_HEADS * ceil(D_V / BLOCK_DV), S)`, `S` being 1 without SPLIT. All tensors
    are contiguous. TIED says that key and value are the same numbers and that one block holds all of D, so that a token
    is loaded once; then `value` is not read. UPCAST widens operands before a product: the interpreter's dot reads
    bfloat16 as integers.
    """
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    VALUE_TILES: tl.constexpr = (D_V + BLOCK_DV - 1) // BLOCK_DV
    key_head, value_tile, split = tl.program_id(1) // VALUE_TILES, tl.program_id(1) % VALUE_TILES, tl.program_id(2)
    if n_requests == 0:  # then there are no offsets to read
        return
    request, first_target, first_row, rows_left = _rows_of_tile(
        target_offsets, n_targets, n_requests, True, GROUP, BLOCK_M
    )
    if rows_left <= 0:
        return
    head_row = first_target.to(tl.int64) * HEADS + key_head + first_row.to(tl.int64) * KEY_HEADS
    query_base = query + head_row * D
    first_value_column = value_tile * BLOCK_DV
    query_tile = _load_tile(query_base, KEY_HEADS * D, rows_left, 0, BLOCK_M, BLOCK_D, D, True, UPCAST)
    state = _empty(BLOCK_M, BLOCK_DV)
    if segment_offsets is None:
        # Equal parts of whole blocks; a short history leaves the last parts empty.
        first_token, length = _rows_of_segments(history_offsets, history_lengths, request, True, n_tokens)
        blocks_a_part = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(2))
        begin = split * blocks_a_part * BLOCK_N
        end = tl.minimum(begin + blocks_a_part * BLOCK_N, length)
        state = _attend_segment(
            state, query_tile, query_base, rows_left, key, value, key_head,
            first_token, first_value_column, begin, end, 0.0,
            SCALE, KEY_HEADS, D, D_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, TIED, False, UPCAST,
        )  # fmt: skip
        read = begin < end
    else:
        state, read = _attend_list(
            state, query_tile, query_base, rows_left, key, value, key_head, first_value_column, request,
            history_offsets, history_lengths, segment_offsets, segment_bias, n_tokens, n_segments,
            SCALE, KEY_HEADS, D, D_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, TIED, UPCAST,
        )  # fmt: skip

    acc, row_max, row_sum = state
    if SPLIT:
        head_row += split.to(tl.int64) * n_targets * HEADS
        if value_tile == 0:
            _store_stats(stats + head_row * 2, KEY_HEADS, row_max, row_sum, rows_left, BLOCK_M)
        if not read:  # the sum 0 says all: combine_kernel drops what it finds in this part's `out`
            return
    else:
        acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    _store_tile(out + head_row * D_V, KEY_HEADS * D_V, acc, rows_left, first_value_column, BLOCK_M, BLOCK_DV, D_V)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def combine_kernel(
    partial_out,  # (S, N_t, HEADS, D_V) float32
    partial_stats,  # (S, N_t, HEADS, 2) float32
    n_rows,  # N_t * HEADS
    n_parts,  # S
    out,  # (N_t, HEADS, D_V)
    D_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Join the parts of the history: each is brought to the common maximum, then summed and divided by the common sum.

    Grid: `(N_t * HEADS,)`. `BLOCK_DV` is at least `D_V`; `BLOCK_S` parts are in flight at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    top = tl.full([], _LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, n_parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        held = part < n_parts
        part_row = part.to(tl.int64) * n_rows + row
        part_max = tl.load(partial_stats + part_row * 2, mask=held, other=_LOWEST)
        part_sum = tl.load(partial_stats + part_row * 2 + 1, mask=held, other=0.0)
        # Loaded before it is known whether the part is empty, which saves a round trip; then dropped if it is.
        pointers = partial_out + part_row[:, None] * D_V + columns[None, :]
        values = tl.load(pointers, mask=held[:, None] & (columns[None, :] < D_V), other=0.0)
        values = tl.where(part_sum[:, None] == 0.0, 0.0, values)  # not `> 0`: NaN must not pass for empty

        new_top = tl.maximum(top, tl.max(part_max, 0))
        rescale = tl.exp2(top - new_top)
        part_rescale = tl.exp2(part_max - new_top)
        acc = acc * rescale + tl.sum(values * part_rescale[:, None], 0)
        total = total * rescale + tl.sum(part_sum * part_rescale, 0)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D_V + columns, acc.to(out.dtype.element_ty), mask=columns < D_V)
