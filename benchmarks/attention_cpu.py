"""The CPU half of `attention.py`: kernels in the interpreter for their numbers, the forms a CPU runs for their speed.

Each timed form runs in a process of its own, so that its peak memory is its own. The forms of a case take turns, so
that a machine that is busy for a while slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stca.checks.timing import machine
from stca.plugins import launch, torch_op
from stca.plugins.interpret import Interpreter
from stca.plugins.reference import target_history_attention as reference
from stca.plugins.spec import DOMAIN, OP_NAME
from stca.plugins.tiling import Plan, Tile

HISTORY, TARGETS, ROUNDS = 10_000, 300, 15
# Form, width, heads. Absorbed at width 1024 would be 197 GFLOP a run, and nobody should run it on a CPU.
CASES = (("projected", 256, 8), ("absorbed", 256, 8), ("projected", 1024, 16))


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What has been measured so far, as one JSON-able dictionary, again after each case."""
    end = time.monotonic() + args.limit_seconds
    rows: list[dict[str, Any]] = []
    body: dict[str, Any] = {
        "machine": machine(args.threads),
        "note": "ran on a CPU: kernels interpreted for their numbers alone; no figure here is a GPU's",
        "gpu_goals": "not measured",
    }
    if args.only in (None, "parity"):
        yield (body := {**body, "parity": _parity()})
    if args.only == "parity":
        return
    body |= {"history": HISTORY, "targets": TARGETS, "dtype": "float32", "rows": rows}
    for form, width, heads in CASES:
        case = {"form": form, "width": width, "heads": heads}
        if time.monotonic() > end:
            rows.append({**case, "skipped": "out of time"})
            continue
        rows += [{**case, **measured} for measured in _take_turns(form, width, heads, args.threads)]
        print(json.dumps(rows[-len(FORMS) :], indent=1), file=sys.stderr, flush=True)
        yield body
    yield body


def _take_turns(form: str, width: int, heads: int, threads: int) -> list[dict[str, Any]]:
    """Time of each form in turn, `ROUNDS` times, and each process's peak memory."""
    command = [sys.executable, str(Path(__file__).with_name("attention.py")), "--child"]
    children = {}
    for name in FORMS:
        spec = json.dumps([name, form, width, heads, threads])
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children[name] = subprocess.Popen([*command, spec], **pipes)
        assert _ask(children[name]) == "ready", f"{name} failed: its message is above"
    times: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(ROUNDS):
        for name, child in children.items():
            times[name].append(float(_ask(child, "run")))
    rows = []
    for name, child in children.items():
        peak = float(_ask(child, "peak"))
        child.communicate()
        rows.append(
            {
                "name": name,
                "median_seconds": float(np.median(times[name])),
                "fastest_seconds": min(times[name]),
                "runs": ROUNDS,
                "peak_mebibytes": peak,
            }
        )
    return rows


def _ask(child: subprocess.Popen[str], order: str = "") -> str:
    """Send an order, if any, and wait for the one-line answer."""
    assert child.stdin is not None
    assert child.stdout is not None
    if order:
        child.stdin.write(order + "\n")
        child.stdin.flush()
    return child.stdout.readline().strip()


def _parity() -> dict[str, Any]:
    """Our kernels in Triton's interpreter against float64, and PyTorch's own error in the same precision."""
    try:
        import triton
    except ImportError:
        return {"skipped": "Triton is not installed"}
    checks = []
    with Interpreter() as interpreter:
        for form, dtype, parts in (
            (form, dtype, parts)
            for form in ("projected", "absorbed")
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for parts in (1, 3)
        ):
            query, key, value = _tensors(form, 64, 4, 77, 9, dtype)
            structure = _structure(query, key)
            depth = query.shape[2]
            out = torch.full_like(query[:, :, : value.shape[2]], float("nan"))
            plan = Plan(Tile(16, 16, depth, depth, 4, 2), parts, 0.0)
            steps = launch.launches(query, key, value, *structure, depth**-0.5, plan, out, upcast=True)
            launch.run_interpreted(steps, interpreter)
            wide = [x.double().numpy() for x in (query, key, value)]
            truth = reference(*wide, *(x.numpy() for x in structure), scale=depth**-0.5)
            theirs = float(np.abs(_torch_sdpa(query, key, value)().double().numpy() - truth).max())
            error = float(np.abs(out.double().numpy() - truth).max())
            allowed = 2 * theirs + torch.finfo(dtype).eps * float(np.abs(truth).max())
            name = f"{form} {dtype} parts {parts}"
            checks.append({"case": name, "error": error, "allowed": allowed, "passed": error <= allowed})
    return {"triton": triton.__version__, "passed": all(check["passed"] for check in checks), "checks": checks}


def _tensors(
    form: str, width: int, heads: int, history: int, targets: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    key_heads, depth = (heads, width // heads) if form == "projected" else (1, width)
    query = torch.randn(targets, heads, depth, generator=generator).to(dtype)
    key = torch.randn(history, key_heads, depth, generator=generator).to(dtype)
    value = torch.randn(history, key_heads, depth, generator=generator).to(dtype) if key_heads > 1 else key
    return query, key, value


def _structure(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets and lengths of a single request."""
    targets, tokens = len(query), len(key)
    ends = ([0, targets], [0, tokens], [tokens])
    target_offsets, history_offsets, lengths = (torch.tensor(x, dtype=torch.int32) for x in ends)
    return target_offsets, history_offsets, lengths


def _torch_op(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    structure = _structure(query, key)
    return lambda: torch.ops.stca.target_history_attention(query, key, value, *structure, query.shape[2] ** -0.5)


def _torch_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    q = torch_op.stack_heads(query, key.shape[1])[None]
    k, v = (x.transpose(0, 1)[None] for x in (key, value))
    scale = query.shape[2] ** -0.5
    return lambda: torch_op.unstack_heads(scaled_dot_product_attention(q, k, v, scale=scale)[0], len(query))


def _session(node: Any, feeds: dict[str, Tensor], opset: int, rows: int) -> Callable[[], Tensor]:
    """A model of one node in ONNX Runtime; dimension `rows` of its inputs is symbolic."""
    import onnxruntime
    from onnx import TensorProto, helper

    from stca.plugins import onnx_function

    values = []
    for name, x in feeds.items():
        element = TensorProto.FLOAT if x.is_floating_point() else TensorProto.INT32
        shape = [f"{name}_rows" if i == rows else n for i, n in enumerate(x.shape)]
        values.append(helper.make_tensor_value_info(name, element, shape))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["x", "y", "z"])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "attention", values, [out]), opset_imports=opsets, ir_version=11
    )
    onnx_function.attach(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: x.numpy() for name, x in feeds.items()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _onnx_function(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    from onnx import helper

    from stca.plugins.onnx_function import OPSET

    structure = _structure(query, key)
    names = ("query", "key", "value", "target_offsets", "history_offsets", "history_lengths")
    feeds = dict(zip(names, (query, key, value, *structure), strict=True))
    node = helper.make_node(OP_NAME, names, ["out"], domain=DOMAIN, scale=query.shape[2] ** -0.5)
    return _session(node, feeds, OPSET, 0)


def _packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, Tensor], int]:
    """`(1, rows, heads * D)`, the layout in which neither op needs a transpose of key and value, and its heads."""
    heads = key.shape[1]
    rows = {"query": query, "key": key, "value": value}
    return {name: x.reshape(1, -1, heads * x.shape[2]) for name, x in rows.items()}, heads


def _onnx_attention(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    from onnx import helper

    feeds, heads = _packed(query, key, value)
    scale = query.shape[2] ** -0.5
    node = helper.make_node("Attention", list(feeds), ["out"], q_num_heads=heads, kv_num_heads=heads, scale=scale)
    call = _session(node, feeds, 23, 1)
    return lambda: call().reshape(len(query), query.shape[1], -1)


def _multi_head_attention(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    from onnx import helper

    feeds, heads = _packed(query, key, value)
    scale = query.shape[2] ** -0.5
    node = helper.make_node(
        "MultiHeadAttention", list(feeds), ["out"], domain="com.microsoft", num_heads=heads, scale=scale
    )
    call = _session(node, feeds, 18, 1)
    return lambda: call().reshape(len(query), query.shape[1], -1)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]] = {
    "ONNX Runtime, our function body (MatMul, Softmax)": _onnx_function,
    "ONNX Runtime, Attention of opset 23": _onnx_attention,
    "ONNX Runtime, com.microsoft MultiHeadAttention": _multi_head_attention,
    "torch op": _torch_op,
    "torch scaled_dot_product_attention": _torch_sdpa,
}


def child(spec: str) -> None:
    """One form in this process, after a check of its output against the torch op's.

    Answers each "run" with its seconds, and "peak" with the mebibytes it took beyond the inputs.
    """
    name, form, width, heads, threads = json.loads(spec)
    torch.set_num_threads(threads)
    query, key, value = _tensors(form, width, heads, HISTORY, TARGETS, torch.float32)
    few = FORMS[name](query[:2], key[:50], value[:50])()
    torch.testing.assert_close(few, _torch_op(query[:2], key[:50], value[:50])(), rtol=1e-4, atol=1e-5)
    before = _peak()
    call = FORMS[name](query, key, value)
    call()
    print("ready", flush=True)
    for order in sys.stdin:
        if order.strip() == "peak":
            print(round((_peak() - before) / 1024, 1), flush=True)
            continue
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
