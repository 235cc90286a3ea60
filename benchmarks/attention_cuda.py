"""The GPU half of `attention.py`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attention_parity import FORMS, parity
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stca.plugins import aot, launch, ptx_launch, tile_table, tiling, torch_op
from stca.plugins.devices import device_for
from stca.plugins.tiling import Plan, Shape, Sizes

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the operator's arguments, in its order
Case = tuple[str, tuple[int, int], int, int]  # form, (width, heads), history, targets
DTYPE = torch.bfloat16


def run(args: argparse.Namespace, model_sizes: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    """What has been measured so far, as one JSON-able dictionary, again after each row."""
    clock = _Clock(args.limit_seconds)
    properties = torch.cuda.get_device_properties(0)
    body: dict[str, Any] = {
        "gpu": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "cuda": torch.version.cuda,
        "dtype of speeds": str(DTYPE),
        "timing": "8 calls in a graph, each behind a read of four times the second-level cache, less the reads alone",
    }
    # The figures people look for first, so that a short budget still has them.
    cases = sorted(itertools.product(FORMS, model_sizes, args.history, args.targets), key=_unusual)
    if args.tune:
        yield from _tune(args.tune, cases, body, clock)
        return
    if args.only in (None, "parity"):
        for result in parity(model_sizes, "cuda", clock.spent, args.skip):
            body["parity"] = result
            yield body
    if args.only == "parity":
        return
    body |= {
        "ceilings": {"copy_bytes_per_second": _copy_rate(), "matrix_operations_per_second": _matrix_rate()},
        "rows": [],
        "skipped_for_time": 0,
    }
    for form, (width, heads), history, targets in cases[args.skip :]:
        if clock.spent():
            body["skipped_for_time"] += 1
            continue
        case = _case(form, width, heads, history, targets)
        sizes = {"form": form, "width": width, "heads": heads, "history": history, "targets": targets}
        row = _embedded(case) if args.only == "ptx" else _row(case, body["ceilings"], clock)
        body["rows"].append({**sizes, **row})
        print(json.dumps(body["rows"][-1]), file=sys.stderr, flush=True)
        yield body
    yield body


def _unusual(case: Case) -> tuple[bool, bool, bool]:
    _, (width, _), history, targets = case
    return width != 1024, history != 10_000, targets not in (8, 300)


class _Clock:
    def __init__(self, limit: float) -> None:
        self._end = time.monotonic() + limit

    def spent(self) -> bool:
        return time.monotonic() > self._end


def _case(form: str, width: int, heads: int, history: int, targets: int) -> Tensors:
    """One request on the GPU, in the operator's layout; absorbed, key and value are the same tensor."""
    generator = torch.Generator("cuda").manual_seed(history + targets)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(DTYPE)

    if form == "projected":
        query, key = normal(targets, heads, width // heads), normal(history, heads, width // heads)
        value = normal(history, heads, width // heads)
    else:
        query, key = normal(targets, heads, width), normal(history, 1, width)
        value = key
    ends = ([0, targets], [0, history], [history])
    target_offsets, history_offsets, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ends)
    return query, key, value, target_offsets, history_offsets, lengths


def _row(case: Tensors, ceilings: dict[str, float], clock: _Clock) -> dict[str, Any]:
    query, key, value = case[:3]
    (targets, heads, _), history = query.shape, len(key)
    distinct = [query, key] if value is key else [query, key, value]
    moved = sum(x.numel() * x.element_size() for x in distinct) + targets * heads * value.shape[2] * 2
    operations = 2 * targets * heads * history * (query.shape[2] + value.shape[2])
    floor = max(moved / ceilings["copy_bytes_per_second"], operations / ceilings["matrix_operations_per_second"])
    scale = query.shape[2] ** -0.5
    plan = tiling.choose(launch.shape_of(query, key, value), Sizes(targets, history, 1), launch.device_of(query))
    ours = _seconds(lambda: torch.ops.stca.target_history_attention(*case, scale))
    peers = {name: _tried(functools.partial(peer, *case[:3], scale), clock) for name, peer in PEERS.items()}
    timed = {name: x for name, x in peers.items() if isinstance(x, float)}
    best = min(timed, key=lambda name: timed[name]) if timed else None
    return {
        "bytes": moved,
        "operations": operations,
        "floor_seconds": floor,
        "bound": "bytes" if moved / ceilings["copy_bytes_per_second"] >= floor else "operations",
        "seconds": ours,
        "roofline_fraction": floor / ours,
        "copy_bandwidth_fraction": moved / ours / ceilings["copy_bytes_per_second"],
        "plan": {**dataclasses.asdict(plan.tile), "parts": plan.parts, "measured": plan.measured},
        "model_seconds": plan.seconds,
        "peers": peers,
        "best_peer": best,
        "speedup_over_best_peer": timed[best] / ours if best else None,
    }


def _tried(peer: Callable[[], Callable[[], Tensor]], clock: _Clock) -> float | str:
    """Seconds, or why there are none."""
    if clock.spent():
        return "skipped: out of time"
    try:
        return _seconds(peer())
    except Exception as error:  # a peer that cannot run this case is a result, not a failure
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def _seconds(call: Callable[[], object], runs: int = 21) -> float:
    """Median time on the GPU of a call that finds nothing in the second-level cache.

    One graph holds `_CALLS` calls, each behind a read of more memory than the cache has; another the reads alone. What
    the first takes longer is the calls'. The reads leave no written lines behind, whose way back to memory would be
    measured with the call, and a graph leaves the launches' cost on the CPU out, as a server's graph would.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    flush = _flush_buffer()
    graphs = []
    for measured in (call, lambda: None):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(_CALLS):
                flush.sum()
                measured()
    both, reads = ([_replayed(graph) for _ in range(runs)] for graph in graphs)
    return max(1e-9, float(statistics.median(both)) - float(statistics.median(reads))) / _CALLS


_CALLS = 8


def _replayed(graph: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.zeros(torch.cuda.get_device_properties(0).L2_cache_size, device="cuda")  # four times the cache


def _copy_rate() -> float:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return float(2 * source.nbytes / _seconds(lambda: target.copy_(source)))


def _matrix_rate(n: int = 8192) -> float:
    a, b = (torch.randn(n, n, device="cuda").to(DTYPE) for _ in range(2))
    return float(2 * n**3 / _seconds(lambda: a @ b))


def _dense(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The request as PyTorch's attention wants it: `(1, heads, rows, D)`, heads of one key head stacked as rows."""
    stacked = torch_op.stack_heads(query, key.shape[1])
    return stacked[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None]


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, float], Callable[[], Tensor]]:
    def peer(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
        q, k, v = _dense(query, key, value)

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, scale=scale)

        return call

    return peer


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = _dense(query, key, value)
    torch._dynamo.reset()  # past its limit of recompilations dynamo would quietly run the peer eagerly
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, scale=scale)


def _unfused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax((q * scale) @ k.mT, dim=-1) @ v


def _unfused_graph(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
    q, k, v = _dense(query, key, value)
    return lambda: _unfused(q, k, v, scale)


def _compiled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
    q, k, v = _dense(query, key, value)
    torch._dynamo.reset()
    compiled = torch.compile(_unfused, dynamic=False, fullgraph=True)
    return lambda: compiled(q, k, v, scale)


PEERS = {
    "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex_attention": _flex,
    "torch.compile": _compiled,
    "unfused": _unfused_graph,
}


def _embedded(case: Tensors) -> dict[str, Any]:
    """The kernels that an engine would hold, launched as TensorRT would: within 48 KiB of shared memory, which every
    launch may have, and within all that this GPU has."""
    query, key, value, *structure = case
    shape, device, scale = launch.shape_of(query, key, value), launch.device_of(query), query.shape[2] ** -0.5
    sizes, sm = launch.sizes_of(query, key, structure[0]), aot.artifact_sm(device.sm)
    expected = torch.ops.stca.target_history_attention(*case, scale)
    row: dict[str, Any] = {"seconds": _seconds(lambda: torch.ops.stca.target_history_attention(*case, scale))}
    for name, limit in (("48 KiB", tiling.PORTABLE_SHARED_LIMIT), ("all", device.shared_limit)):
        parts = tiling.choose(shape, sizes, device, limit).parts
        (tile,) = aot.best_tiles(shape, scale, sizes, parts, sm, limit, 1)
        plan = Plan(tile, parts, 0.0)
        out = torch.full_like(expected, float("nan"))
        steps, kernels = launch.launches(*case, scale, plan, out), ptx_launch.load(shape, plan, sm, scale)
        call = functools.partial(_launch_embedded, steps, kernels)
        seconds = _seconds(call)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        row[name] = {"seconds": seconds, "plan": {**dataclasses.asdict(tile), "parts": parts}}
    return row


def _launch_embedded(steps: list[launch.Launch], kernels: list[ptx_launch.LoadedKernel]) -> None:
    ptx_launch.run(steps, kernels, torch.cuda.current_stream().cuda_stream)


def _tune(table: Path, cases: list[Case], body: dict[str, Any], clock: _Clock) -> Iterator[dict[str, Any]]:
    """Fill `table` row by row: sizes that it lacks first, so that each run goes on where the one before ended."""
    known, sm = tile_table.read_plans(table), device_for(body["sm"]).sm
    body |= {"table": str(table), "tuned": [], "skipped_for_time": 0}

    def key(case: Case) -> tuple[int, Shape, Sizes]:
        form, (width, heads), history, targets = case
        key_heads, depth = (heads, width // heads) if form == "projected" else (1, width)
        shape = Shape(heads, key_heads, depth, depth, str(DTYPE).removeprefix("torch."), tied=form == "absorbed")
        return sm, shape, tiling.rounded(Sizes(targets, history, 1))

    for form, (width, heads), history, targets in sorted(cases, key=lambda case: key(case) in known):
        if clock.spent():
            body["skipped_for_time"] += 1
            continue
        plan = _fastest(_case(form, width, heads, history, targets), clock)
        tile_table.record(table, *key((form, (width, heads), history, targets)), plan)
        found = {"form": form, "width": width, "history": history, "targets": targets, "seconds": plan.seconds}
        body["tuned"].append({**found, **dataclasses.asdict(plan.tile), "parts": plan.parts})
        print(json.dumps(body["tuned"][-1]), file=sys.stderr, flush=True)
        yield body
    yield body


def _fastest(case: Tensors, clock: _Clock, count: int = 8) -> Plan:
    """The fastest of the model's best plans, and of its best for each tile of rows and tokens.

    Each also with half and twice its parts; a wrong one is an error.
    """
    query, key, value, *structure = case
    shape, device, scale = launch.shape_of(query, key, value), launch.device_of(query), query.shape[2] ** -0.5
    sizes = tiling.rounded(launch.sizes_of(query, key, structure[0]))
    ranked = tiling.rank(shape, sizes, device, device.shared_limit, bulk=True)
    each = {(plan.tile.block_m, plan.tile.block_n): plan for plan in reversed(ranked)}
    candidates = [
        dataclasses.replace(plan, parts=min(max(1, int(plan.parts * factor)), tiling.MAX_PARTS))
        for plan in (*ranked[:count], *each.values())
        for factor in (1, 0.5, 2)
    ]
    expected = torch.ops.stca.target_history_attention(*case, scale)
    timed: list[Plan] = []
    for plan in dict.fromkeys(candidates):
        if timed and clock.spent():
            break
        out = torch.full_like(expected, float("nan"))
        steps = launch.launches(*case, scale, plan, out)
        timed.append(dataclasses.replace(plan, seconds=_seconds(functools.partial(launch.run_cuda, steps), 9)))
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2, msg=f"{plan} gives other numbers")
    return min(timed, key=lambda plan: plan.seconds)
