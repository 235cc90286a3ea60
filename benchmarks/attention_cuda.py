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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stca.plugins import launch, tiling, torch_op
from stca.plugins.tiling import Plan, Shape, Sizes

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the operator's arguments, in its order
DTYPE = torch.bfloat16


def run(args: argparse.Namespace, model_sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Everything measured, as one JSON-able dictionary."""
    clock = _Clock(args.limit_seconds)
    ceilings = {"copy_bytes_per_second": _copy_rate(), "matrix_operations_per_second": _matrix_rate()}
    parity = _parity(clock)
    rows: list[dict[str, Any]] = []
    plans: list[dict[str, Any]] = []
    skipped = 0
    # The figures people look for first, so that a short budget still has them.
    order = sorted(itertools.product(model_sizes, args.history, args.targets), key=_unusual)
    for (width, heads), history, targets in order:
        for form in ("projected", "absorbed"):
            if clock.spent():
                skipped += 1
                continue
            case = _case(form, width, heads, history, targets)
            rows.append(_row(form, width, heads, history, targets, case, ceilings, clock))
            if args.tune:
                plans.append(_tuned(case, clock))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if args.tune:
        Path(args.tune).write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "sm": 10 * properties.major + properties.minor,
        "cuda": torch.version.cuda,
        "dtype": str(DTYPE),
        "timing": "median of CUDA events around a graph replay, second-level cache flushed before each",
        "ceilings": ceilings,
        "parity": parity,
        "rows": rows,
        "skipped_for_time": skipped,
    }


def _unusual(case: tuple[tuple[int, int], int, int]) -> tuple[bool, bool, bool]:
    (width, _), history, targets = case
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


def _row(
    form: str,
    width: int,
    heads: int,
    history: int,
    targets: int,
    case: Tensors,
    ceilings: dict[str, float],
    clock: _Clock,
) -> dict[str, Any]:
    query, key, value = case[:3]
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
        "form": form,
        "width": width,
        "heads": heads,
        "history": history,
        "targets": targets,
        "bytes": moved,
        "operations": operations,
        "floor_seconds": floor,
        "bound": "bytes" if moved / ceilings["copy_bytes_per_second"] >= floor else "operations",
        "seconds": ours,
        "roofline_fraction": floor / ours,
        "copy_bandwidth_fraction": moved / ours / ceilings["copy_bytes_per_second"],
        "plan": {**dataclasses.asdict(plan.tile), "splits": plan.splits, "measured": plan.measured},
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


def _seconds(call: Callable[[], Tensor], runs: int = 21) -> float:
    """Median time on the GPU. A graph replay leaves the launches' cost on the CPU out, as a server's graph would."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = _flush_buffer()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return float(statistics.median(times))


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")


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


def _parity(clock: _Clock) -> dict[str, Any]:
    """Largest error of every plan family against float64, and PyTorch's own in the same precision."""
    checks = []
    for form, (width, heads), history, targets in itertools.product(
        ("projected", "absorbed"), ((256, 8), (512, 8), (1024, 16)), (1, 777, 10_000), (1, 17, 300)
    ):
        if clock.spent():
            break
        query, key, value, *structure = _case(form, width, heads, history, targets)
        scale = query.shape[2] ** -0.5
        q, k, v = (x.double() for x in _dense(query, key, value))
        truth = torch_op.unstack_heads(_unfused(q, k, v, scale)[0], targets)
        ours = torch.ops.stca.target_history_attention(query, key, value, *structure, scale)
        dense = scaled_dot_product_attention(*_dense(query, key, value), scale=scale)
        error, theirs = (
            float((x.double() - truth).abs().max()) for x in (ours, torch_op.unstack_heads(dense[0], targets))
        )
        allowed = 2 * theirs + torch.finfo(DTYPE).eps * float(truth.abs().max())
        name = f"{form} {width}/{heads} history {history} targets {targets}"
        checks.append({"case": name, "error": error, "allowed": allowed, "passed": error <= allowed})
    return {"passed": bool(checks) and all(check["passed"] for check in checks), "checks": checks}


def _tuned(case: Tensors, clock: _Clock, count: int = 16) -> dict[str, Any]:
    """The fastest of the model's best plans, each also with half and twice its parts."""
    query, key, value, *structure = case
    shape, device = launch.shape_of(query, key, value), launch.device_of(query)
    sizes = tiling.rounded(launch.sizes_of(query, key, structure[0]))
    candidates = [
        dataclasses.replace(plan, splits=max(1, int(plan.splits * factor)))
        for plan in tiling.rank(shape, sizes, device, device.shared_limit)[:count]
        for factor in (1, 0.5, 2)
    ]
    timed = [
        (_seconds(functools.partial(_with_plan, case, plan), 9), plan)
        for i, plan in enumerate(candidates)
        if i == 0 or not clock.spent()
    ]
    seconds, plan = min(timed, key=lambda x: x[0])
    return _table_row(device.sm, shape, sizes, plan, seconds)


def _with_plan(case: Tensors, plan: Plan) -> Tensor:
    query, _, value = case[:3]
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    launch.run_cuda(launch.launches(*case, query.shape[2] ** -0.5, plan, out))
    return out


def _table_row(sm: int, shape: Shape, sizes: Sizes, plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "sm": sm,
        "shape": dataclasses.asdict(shape),
        "sizes": dataclasses.asdict(sizes),
        "tile": dataclasses.asdict(plan.tile),
        "splits": plan.splits,
        "seconds": seconds,
    }
