"""Does every barrier of a compiled kernel do something? One block of its PTX, run on a CPU with a clock for each warp.

The work of `attention.py --races`. Integers, addresses, predicates and barriers are computed as a GPU would; numbers
with a fraction are not. Two accesses to shared memory of which one writes must be ordered by barriers, however fast the
warps are: vector clocks, as in Fidge, "Timestamps in message-passing systems that preserve the partial ordering", 1988.
Copies and products that run beside their warp have clocks of their own, and what waits for them is what orders them.
Reads and writes of tensors must be inside them. Then each barrier is taken out, one by one: the block must be found
wrong, or the barrier is idle here, that is, others order all that it does.

What it proves is of the blocks and sizes that it ran. Lanes of one warp count as one, stores of one instruction by
several warps as one value, and a fence of descriptors in global memory is taken for granted: none of these is tried.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import triton
from attention_static import CASES
from ptx_block import Block, Instruction, Launch, Wrong, parse
from ptx_warp import run as run_block

from stca.plugins import aot, tiling
from stca.plugins.aot import Artifact
from stca.plugins.devices import device_for
from stca.plugins.tiling import Shape, Tile

SMS: Final = (80, 90, 120)
_REQUESTS: Final = 131
_ORDERS: Final = (
    "bar.sync", "barrier.sync", "cp.async.wait_group", "cp.async.commit_group", "mbarrier.init", "mbarrier.arrive",
    "mbarrier.try_wait", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "fence.proxy.async",
)  # fmt: skip


def barriers(code: Sequence[Instruction]) -> list[Instruction]:
    """Instructions that order others."""
    return [i for i in code if i.op.startswith(_ORDERS)]


def launches(shape: Shape, tile: Tile, sm: int, split: bool) -> list[tuple[Artifact, Launch]]:
    """A plan's kernels, each with the block that does most: the second part of a long history, which ends in a rest.

    Its request is the last of so many that the search for it takes two steps.
    """
    group, steps = shape.group, 2 * (tile.stages + 1)
    first = max(1, tile.block_m // 2 // group)
    targets = np.array([0, *[first] * (_REQUESTS - 1), first + tile.block_m // group + 3], np.int32)
    history = np.array([0, *[50] * (_REQUESTS - 1), 50 + steps * tile.block_n + 7], np.int32)
    lengths = np.array([50, *[0] * (_REQUESTS - 2), steps * tile.block_n + 5], np.int32)
    n_targets, n_tokens, parts = int(targets[-1]), int(history[-1]), 2 if split else 1
    row, rows = shape.element * shape.depth, n_targets * shape.heads
    inputs = [rows * row, *[n_tokens * shape.key_heads * row] * 2, targets, history, lengths]
    numbers, out = [n_targets, n_tokens, _REQUESTS], rows * shape.value_depth * (4 if split else shape.element)
    if shape.segments:
        lists, bias = np.arange(_REQUESTS + 1, dtype=np.int32), 4 * _REQUESTS
        inputs, numbers = [*inputs, lists, bias], [*numbers, _REQUESTS]
    stats = [parts * rows * 8] * split
    place, scale = first * group // tile.block_m + _REQUESTS - 1, shape.depth**-0.5
    grid = aot.attend_grid(n_targets, _REQUESTS, shape, tile, parts)
    if not tile.bulk:
        attend = aot.compile_attend(shape, tile, sm, scale, split)
        return [(attend, Launch((place, 0, parts - 1), grid, [*inputs, *numbers, parts * out, *stats]))]
    attend, finish = aot.compile_bulk(shape, tile, sm, scale)
    scratch = attend.scratch * grid[0] * grid[1] * grid[2]
    place_of_rest = first * group // aot.FINISH.block_m + _REQUESTS - 1
    rest = aot.attend_grid(n_targets, _REQUESTS, shape, aot.FINISH, 1)
    joined = [*inputs, parts * out, *stats, *numbers, parts, rows * shape.value_depth * shape.element]
    return [
        (attend, Launch((place, 0, 1), grid, [*inputs, *numbers, parts * out, *stats, scratch])),
        (finish, Launch((place_of_rest, 0, 0), rest, joined)),
    ]


parsed = functools.lru_cache(maxsize=4)(parse)


def wrong(artifact: Artifact, launch: Launch, without: int | None = None) -> str | None:
    """What is wrong with a block, with one instruction taken out; None if nothing is."""
    code, labels = parsed(artifact.ptx)
    if without is not None:
        code = [i if i.at != without else Instruction(i.at, "setmaxnreg", ()) for i in code]
    try:
        run_block(Block(artifact.threads, artifact.shared, code, labels, launch))
    except Wrong as error:
        return str(error)
    return None


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of each kernel of `attention_static.CASES`: what is wrong, and which barriers nothing misses when taken out."""
    body: dict[str, Any] = {"triton": triton.__version__, "rows": [], "complaints": []}
    for sm in args.sm or SMS:
        for case in CASES:
            plan = tiling.choose(case.shape, case.sizes, device_for(sm), case.limit)
            for artifact, launch in launches(case.shape, plan.tile, sm, plan.parts > 1):
                where = f"SM {sm}, {case.name}, {artifact.kernel}"
                if complaint := wrong(artifact, launch):
                    body["complaints"].append(f"{where}: {complaint}")
                    continue
                tried = barriers(parsed(artifact.ptx)[0])
                idle = [str(i) for i in tried if wrong(artifact, launch, i.at) is None]
                row = {"case": case.name, "sm": sm, "kernel": artifact.kernel, "barriers": len(tried), "idle": idle}
                body["rows"].append(row)
                print(
                    f"{where}: {len(tried) - len(idle)} of {len(tried)} barriers are caught when taken out",
                    file=sys.stderr,
                    flush=True,
                )
                yield body
    print("\n".join(body["complaints"]) or "all accesses are ordered", file=sys.stderr)
    yield body
