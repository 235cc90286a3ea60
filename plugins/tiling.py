"""Which tile, how many parts of the history: a small cost model for the operator's kernels, and a table above it.

Pure Python. Everything is decided from shapes, because that is all TensorRT knows when it launches: a batch is taken to
be `B` requests of equal size. The model counts, for each candidate tile and number of parts, four rates of one
multiprocessor and what stands in the way of reaching them:

* a *step* (one tile of rows against `block_n` tokens) needs `2·M·N·(D + D_v)` operations of the matrix units, `M·N`
  exponentials, `N·(D + D_v)` elements from the cache, and what its instructions read from shared memory. Blocks that
  share a multiprocessor overlap these, so `r` blocks take `r · max(matrix, exponential, cache, shared)` a step, but
  never less than the chain through one of them, `matrix + exponential`, barriers, and the latency not hidden by stages;
* blocks run in *rounds* of as many as fit (registers, shared memory); the last round is as long as the others, which is
  why the number of parts matters: 48 tiles on 132 multiprocessors leave 64 % idle, 5 x 48 in pairs leave 9 %;
* nothing ends before the tensors have moved once through device memory, at its rate, or at that of the tokens which
  all blocks together wait for at a time;
* parts must be joined: another launch, and `S` partial results written and read.

What it cannot know (bank conflicts, clocks, the compiler's schedule) is what `benchmarks/attention.py --tune` is for:
the fastest measured plan per shape goes to `tiles.json`, and `choose` takes that where it has one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stca.plugins.devices import Device
from stca.plugins.spec import QUALIFIED_NAME

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_DEPTH: Final = 512
MAX_DEPTH_ABSORBED: Final = 1024
# Offsets inside a tile are int32: 128 rows, 4096 heads apart, of size 512 are an eighth of what fits.
MAX_HEADS: Final = 4096
MAX_PARTS: Final = 128
BULK_ROWS: Final = 128  # of one product of the two groups that multiply in bulk
PORTABLE_SHARED_LIMIT: Final = 48 * 1024
# Seconds: a dependent access to device memory, a kernel's launch behind another, and the barriers of a step.
MEMORY_LATENCY: Final = 0.7e-6
LAUNCH: Final = 2.0e-6
STEP: Final = 0.15e-6
_PARTS: Final = (*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, MAX_PARTS + 1, 8))
MEASURED_TABLE: Final = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Shape:
    """What is fixed when a kernel is compiled.

    Attributes:
        heads: `H`. key_heads: `H_k`, 1 (absorbed) or `H` (projected).
        depth: `D`. value_depth: `D_v`.
        dtype: of query, key and value: "bfloat16", "float16" or "float32".
        tied: key and value are the same tensor.
        segments: a request reads a list of them; planning takes all `N_h` rows for what it reads.
    """

    heads: int
    key_heads: int
    depth: int
    value_depth: int
    dtype: str
    tied: bool = False
    segments: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, naming what is supported."""
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"{QUALIFIED_NAME}: dtype {self.dtype} is not supported; use one of {', '.join(DTYPE_BYTES)}"
            )
        if not 1 <= self.heads <= MAX_HEADS:
            raise ValueError(f"{QUALIFIED_NAME}: {self.heads} heads are not supported; use 1 to {MAX_HEADS}")
        if self.key_heads not in (1, self.heads):
            raise ValueError(
                f"{QUALIFIED_NAME}: {self.key_heads} key heads for {self.heads} heads; use 1 or {self.heads}"
            )
        limit = MAX_DEPTH_ABSORBED if self.key_heads == 1 else MAX_DEPTH
        for name, depth in (("D", self.depth), ("D_v", self.value_depth)):
            if depth % 16 or not 16 <= depth <= limit:
                raise ValueError(
                    f"{QUALIFIED_NAME}: head size {name} = {depth} is not supported; the kernels take multiples of 16 "
                    f"from 16 to {MAX_DEPTH}, and to {MAX_DEPTH_ABSORBED} with one key head"
                )
        if self.tied and self.depth != self.value_depth:
            raise ValueError(
                f"{QUALIFIED_NAME}: tied key and value differ in head size: {self.depth}, {self.value_depth}"
            )

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.key_heads

    @property
    def element(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Sizes:
    """What changes from launch to launch: `N_t`, `N_h`, `B`."""

    targets: int
    tokens: int
    requests: int


@dataclass(frozen=True)
class Tile:
    """Constants of one compiled `attend_kernel`, or with `bulk` of `attend_bulk_kernel`; all but `stages` are powers of
    two. In bulk, two groups of `warps` multiply and one copies, and rows may be a multiple of `BULK_ROWS`."""

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    warps: int
    stages: int
    bulk: bool = False


@dataclass(frozen=True)
class Plan:
    """A tile, the parts the history is cut into, and what the model (or a measurement) says that takes."""

    tile: Tile
    parts: int
    seconds: float
    measured: bool = False


def check_sizes(shape: Shape, sizes: Sizes) -> None:
    """Refuse what the kernels, which count rows, tokens and blocks in int32, cannot count.

    Raises:
        ValueError: naming the size, its value and the limit.
    """
    # Tiles and parts are whole blocks: the last may end MAX_PARTS blocks of 128 beyond the rows or tokens there are.
    # Requests are added to the number of tiles, which is at most N_t * H / 16.
    whole_blocks = 2**31 - 2 * MAX_PARTS * 128
    for name, size, limit in (
        ("N_t * H", sizes.targets * shape.heads, whole_blocks),
        ("N_h", sizes.tokens, whole_blocks),
        ("B", sizes.requests, 2**30),
    ):
        if size >= limit:
            raise ValueError(f"{QUALIFIED_NAME}: {name} is {size}, expected less than {limit}; send smaller batches")


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def is_wide(shape: Shape, tile: Tile, sm: int) -> bool:
    """Whether the products are the warp-group or tensor-memory kind, which read their operands from shared memory."""
    return sm in (90, 100) and tile.block_m >= 64 and shape.element == 2


def is_tied(shape: Shape, tile: Tile) -> bool:
    """Whether one load of a token serves as key and as value."""
    return shape.tied and tile.block_d >= shape.depth and tile.block_dv >= shape.value_depth


def shared_bytes(shape: Shape, tile: Tile, sm: int) -> int:
    """A block's shared memory in bytes: query, weights and tokens in the loop, or the accumulators on their way out."""
    wide = is_wide(shape, tile, sm)
    if tile.bulk:  # query, tokens and the accumulators on their way out all at once
        tokens = tile.block_m * tile.block_d + tile.stages * tile.block_n * (tile.block_d + tile.block_dv)
        return shape.element * tokens + 4 * BULK_ROWS * tile.block_dv + 1024
    chunks = math.ceil(shape.depth / tile.block_d)
    token = chunks * tile.block_d + (0 if wide and is_tied(shape, tile) else tile.block_dv)
    query = tile.block_m * tile.block_d * chunks
    weights = 0 if wide and tile.warps <= tile.block_m // 16 else tile.block_m * tile.block_n
    if tile.stages == 1 and not is_tied(shape, tile):  # no pipeline: a tile of tokens passes through when needed
        tokens = tile.block_n * max(tile.block_d, tile.block_dv)
    elif tile.stages == 1:
        tokens = tile.block_n * token
    else:
        buffers = tile.stages if wide else tile.stages - 1
        tokens = tile.block_n * token * (buffers + (sm == 100 and wide and is_tied(shape, tile)))
    barriers = 1024 if wide and sm == 100 else 64 if shape.element == 4 else 0
    return max(shape.element * (query + weights + tokens), 4 * tile.block_m * tile.block_dv) + barriers


def shared_traffic(shape: Shape, tile: Tile, sm: int) -> int:
    """Bytes that a step moves through shared memory: tokens written, operands read, weights passed between warps."""
    depth = -(-shape.depth // tile.block_d) * tile.block_d
    token = depth + tile.block_dv
    written = tile.block_n * (depth if is_tied(shape, tile) else token)
    if is_wide(shape, tile, sm):  # a warp group's products read 64 rows and the tokens
        return shape.element * (
            written + tile.block_m * depth + _repeats(tile, sm) * tile.block_m // 64 * tile.block_n * token
        )
    along_rows = min(tile.warps, tile.block_m // 16)
    along_tokens = tile.warps // along_rows
    query = tile.block_m * along_tokens * depth if tile.block_d < shape.depth else 0  # else it is in registers
    keys = tile.warps * max(tile.block_n // along_tokens, 8) * depth
    weights = tile.block_m * tile.block_n * (1 + along_tokens) if along_tokens > 1 else 0
    return shape.element * (written + query + keys + along_rows * tile.block_n * tile.block_dv + weights)


def _repeats(tile: Tile, sm: int) -> int:
    """How often wide products are done: on SM 90 two warp groups over 64 rows do the same twice."""
    return max(1, tile.warps // (tile.block_m // 16)) if sm == 90 else 1


def registers(shape: Shape, tile: Tile, sm: int) -> int:
    """About how many registers a thread needs: fitted to what ptxas reports, to tell occupancy and to avoid spills."""
    if tile.bulk:
        return 168  # what a third of all leaves each; the groups that multiply take from the one that copies
    threads = 32 * tile.warps
    accumulators = tile.block_m * tile.block_dv // threads
    logits = tile.block_m * tile.block_n // threads
    if is_wide(shape, tile, sm):
        long = 32 * (shape.depth > 256)  # a query in more pieces than one
        return int((75 + 1.1 * accumulators if sm == 100 else 40 + accumulators) + 1.75 * logits + long)
    if shape.element == 4:
        return int(58 + accumulators + 4 * logits + 2 * tile.block_d)
    query = tile.block_d // 4 if tile.block_d >= shape.depth else 16
    tokens = tile.block_n * max(tile.block_d, tile.block_dv) // (2 * threads) if tile.stages == 1 else 0
    return int(50 + 1.2 * accumulators + 2.5 * logits + query + tokens)


def tiles(shape: Shape, sm: int, shared_limit: int) -> Iterator[Tile]:
    """Every candidate that fits: accumulators in registers without spills, tokens in `shared_limit` bytes.

    Few rows per tile for few queries (16 is the least the matrix units take), many where the arithmetic dominates.
    Float32 products run on the ordinary units, whose operands are all registers, so those tiles stay small.
    """
    exact = shape.element == 4
    value_width = power_of_two(shape.value_depth)
    value_blocks = [w for w in (value_width, value_width // 2, value_width // 4) if w == value_width or w >= 128]
    rows_warps = ((16, 8),) if exact else ((16, 4), (16, 8), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8))
    for (block_m, warps), block_dv in itertools.product(rows_warps, value_blocks):
        for block_n, stages in itertools.product((16, 32) if exact else (16, 32, 64, 128), (1, 2, 3, 4)):
            tile = Tile(block_m, block_n, _chunk(shape, block_m, warps, sm), block_dv, warps, stages)
            wide = is_wide(shape, tile, sm)
            spills = registers(shape, tile, sm) >= 224 or block_n * block_dv > (16384 if wide else 4096 * warps)
            # Too few products to go round, or so few tokens that reading the query takes longer than its products.
            idle = block_m * block_n < (32 if exact else 64) * warps or (wide and block_n < 32)
            too_deep = (wide and shape.depth > 512) or (exact and block_n * shape.depth > 16 * MAX_DEPTH_ABSORBED)
            if not (spills or idle or too_deep) and shared_bytes(shape, tile, sm) <= shared_limit:
                yield tile


def bulk_tiles(shape: Shape, sm: int) -> list[Tile]:
    """Of `attend_bulk_kernel`, which only Triton's own launcher can launch: for SM 90 and heads it was compiled for.
    More rows read fewer tokens from the cache; their sums fill the registers, so logits get half the room."""
    width = shape.depth if shape.depth == shape.value_depth else 0
    taken = sm == 90 and shape.element == 2 and not shape.segments and width in (32, 64, 128)
    sizes = ((1, min(128, 8192 // max(width, 1))), (2, 64), (3, 64))
    return [Tile(n * BULK_ROWS, m, width, width, 4, 2, bulk=True) for n, m in sizes if taken and n * width <= 256]


def _chunk(shape: Shape, block_m: int, warps: int, sm: int) -> int:
    """How much of a head one product takes.

    All of it where the query stays in shared memory anyway. Elsewhere a query that is one chunk stays in registers, and
    all warps of a 16-row tile hold it whole; cut in chunks it waits in shared memory instead.
    """
    depth = power_of_two(shape.depth)
    if shape.element == 4:
        return min(depth, 64)
    if sm in (90, 100) and block_m >= 64:
        return min(depth, 512)
    if block_m == 16:
        return min(depth, 512 if shape.tied and warps == 8 and depth <= 512 else 256)
    return depth if depth * block_m <= 4096 else 64


def seconds(shape: Shape, sizes: Sizes, tile: Tile, parts: int, device: Device) -> float:
    """The model's time of the whole operator; the terms are explained at the top of this file."""
    return _order(shape, sizes, tile, parts, device)[0]


def _order(shape: Shape, sizes: Sizes, tile: Tile, parts: int, device: Device) -> tuple[float, float, int]:
    """The time; where the bytes are the floor of many, the time without that floor; then the more stages."""
    inside, floor = _attend_seconds(shape, sizes, tile, parts, device)
    rest = LAUNCH + combine_seconds(shape, sizes, parts, device, tile.bulk)
    return max(inside, floor) + rest, inside + rest, -tile.stages


def _attend_seconds(shape: Shape, sizes: Sizes, tile: Tile, parts: int, device: Device) -> tuple[float, float]:
    """Of the blocks' rounds, and of moving the tensors once through device memory."""
    rows = max(1, sizes.targets * shape.group // max(1, sizes.requests))
    length = max(1, sizes.tokens // max(1, sizes.requests))
    columns = shape.key_heads * -(-shape.value_depth // tile.block_dv)
    count = sizes.requests * -(-rows // tile.block_m) * columns * parts
    steps = length / (tile.block_n * parts) if tile.bulk else -(-length // (tile.block_n * parts))
    chunked_depth = -(-shape.depth // tile.block_d) * tile.block_d
    token = chunked_depth + (0 if is_tied(shape, tile) else tile.block_dv)

    processors = device.multiprocessors
    operations = 2 * tile.block_m * tile.block_n * (chunked_depth + tile.block_dv)
    matrix = operations * processors / (device.matrix * _matrix_efficiency(shape, tile, device))
    exponential = tile.block_m * tile.block_n * processors / device.exponentials
    shared = shared_traffic(shape, tile, device.sm) * processors / device.shared_bandwidth
    cache = tile.block_n * token * shape.element * processors / device.cache_bandwidth

    threads = 32 * tile.warps * (1 + 2 * tile.bulk)
    resident = min(
        65536 // (threads * registers(shape, tile, device.sm)),
        device.shared // (shared_bytes(shape, tile, device.sm) + 1024),
        2048 // threads if device.sm in (80, 90, 100) else 1536 // threads,
    )
    together = max(1, min(resident, -(-count // processors)))
    rounds = -(-count // (processors * together))
    alone = matrix + exponential + STEP  # in bulk two groups take turns, and a third copies
    chain = alone / 2 if tile.bulk else alone + MEMORY_LATENCY / tile.stages
    step = max(together * max(matrix, exponential, cache, shared), chain)
    moved = shape.element * (
        sizes.targets * shape.heads * (shape.depth + shape.value_depth)
        + sizes.tokens * shape.key_heads * (shape.depth + (0 if shape.tied else shape.value_depth))
    )
    waiting = shape.element * tile.block_n * token * (tile.stages if tile.bulk else max(1, tile.stages - 1))
    bandwidth = min(device.bandwidth, min(count, processors * together) * waiting / MEMORY_LATENCY)
    return rounds * (4 * MEMORY_LATENCY + steps * step), moved / bandwidth


def combine_block(shape: Shape) -> tuple[int, int, int]:
    """`BLOCK_S`, `BLOCK_DV` and warps of `combine_kernel`: 8 to 32 numbers in flight a thread."""
    width = power_of_two(shape.value_depth)
    parts = max(2, min(16, 4096 // width))
    return parts, width, max(1, min(4, parts * width // 1024))


def combine_seconds(shape: Shape, sizes: Sizes, parts: int, device: Device, bulk: bool = False) -> float:
    """Writing the parts, and the kernel that reads them back; `finish_kernel` starts while the first still runs."""
    if parts == 1 and not bulk:
        return 0.0
    partial = 4 * parts * sizes.targets * shape.heads * (shape.value_depth + 2)
    return (0.0 if bulk else LAUNCH) + 2 * MEMORY_LATENCY + 2 * partial / device.cache_bandwidth


def _matrix_efficiency(shape: Shape, tile: Tile, device: Device) -> float:
    """Part of the dense 16-bit rate that a tile's kind of product reaches."""
    if shape.element == 4:
        return 0.03  # ordinary multiply-adds
    if is_wide(shape, tile, device.sm):
        return 0.7 / _repeats(tile, device.sm)
    if device.sm not in (90, 100):
        return 0.7
    return 0.4  # the older matrix instructions on a GPU built for wide ones


def choose(shape: Shape, sizes: Sizes, device: Device, shared_limit: int | None = None) -> Plan:
    """The plan for a launch: the measured one where `tiles.json` has this shape and size, else the model's best.

    A `shared_limit` is an engine's, whose launcher brings no scratch memory: then nothing is copied in bulk. Sizes are
    rounded up to three significant bits first, so that a server with ever-changing histories meets few plans.

    Raises:
        ValueError: when no tile fits.
    """
    return _choose(shape, rounded(sizes), device, shared_limit or device.shared_limit, shared_limit is None)


@functools.lru_cache(maxsize=4096)
def _choose(shape: Shape, sizes: Sizes, device: Device, shared_limit: int, bulk: bool) -> Plan:
    from stca.plugins import tile_table  # which knows plans

    measured = tile_table.measured_plans(MEASURED_TABLE).get((device.sm, shape, sizes))
    if measured and (bulk or not measured.tile.bulk) and shared_bytes(shape, measured.tile, device.sm) <= shared_limit:
        return measured
    return rank(shape, sizes, device, shared_limit, bulk)[0]


def rank(shape: Shape, sizes: Sizes, device: Device, shared_limit: int, bulk: bool = False) -> list[Plan]:
    """The best number of parts for every candidate tile, with `bulk` those of `bulk_tiles` too, fastest first.

    Raises:
        ValueError: when no tile fits `shared_limit`.
    """
    length = max(1, sizes.tokens // max(1, sizes.requests))
    plans = []
    for tile in (*tiles(shape, device.sm, shared_limit), *(bulk_tiles(shape, device.sm) if bulk else ())):
        timed = ((_order(shape, sizes, tile, s, device), s) for s in _PARTS if s == 1 or s * tile.block_n <= length)
        plans.append((*min(timed), tile))
    if not plans:
        raise ValueError(
            f"{QUALIFIED_NAME}: no tile of {shape} fits {shared_limit} bytes of shared memory on SM {device.sm}"
        )
    return [Plan(tile, parts, order[0]) for order, parts, tile in sorted(plans, key=lambda plan: plan[:2])]


def rounded(sizes: Sizes) -> Sizes:
    """Sizes rounded up to three significant bits: the keys of the measured table."""

    def up(n: int) -> int:
        step = 1 << max(n.bit_length() - 3, 0)
        return -(-n // step) * step

    return Sizes(up(sizes.targets), up(sizes.tokens), up(sizes.requests))
