"""Everything of this repository that only a GPU can prove, as steps to run on a machine that has one.

Nothing here has been run on a GPU yet. Each proof is a list of commands in processes of their own, so that a crash
costs one proof alone, and each says what it needs, so that a machine without it is told what is missing.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stca.arrays import Progress
from stca.errors import BuildError

LIMIT_SECONDS: Final = 600.0
_BUILD, _VERIFY = ("build", "{bundle}", "--engine"), ("verify", "{bundle}", "--json", "--engine")


@dataclass(frozen=True)
class Proof:
    """One thing to prove.

    Attributes:
        name: what.
        needs: facts of `stca doctor`.
        steps: arguments of `python -m`; `{bundle}` is a bundle of the shipped checkpoint.
    """

    name: str
    needs: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...]


def _stca(*steps: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(("stca", *step) for step in steps)


def _engine(flavour: str, precision: str, attention: str, *needs: str) -> Proof:
    build = (*_BUILD, flavour, "--precision", precision, "--lowering", attention, "--no-cache")
    bench = ("bench", "{bundle}", "--json", "--engine", flavour, "--precision", precision, "--seconds", "0.2")
    return Proof(
        f"{flavour}, {precision}, {attention}: built, right against float64, measured",
        ("gpu", flavour, *needs),
        _stca(build, (*_VERIFY, flavour, "--precision", precision), (*bench, "--history", "512", "--targets", "32")),
    )


_PYTHON: Final = ("stca.checks.unproven",)
PROOFS: Final = (
    Proof("the operator's kernels through torch, against float64", ("gpu", "torch-cuda"), ((*_PYTHON, "operator"),)),
    Proof(
        "the PTX that engines embed, launched as TensorRT does", ("gpu", "torch-cuda"), ((*_PYTHON, "embedded"),)
    ),
    *(_engine("tensorrt", p, a) for p, a in (("bf16", "quick"), ("fp16", "fused"), ("fp32", "decomposed"))),
    _engine("tensorrt", "bf16", "plugin", "TensorRT headers", "CUDA headers", "cmake"),
    Proof(
        "tensorrt: new weights put into a finished engine",
        ("gpu", "tensorrt"),
        _stca(
            (*_BUILD, "tensorrt", "--refit", "identical", "--no-cache"),
            ("refit", "{bundle}", "--checkpoint", "{checkpoint}"),
        ),
    ),
    *(_engine("tensorrt-rtx", p, a) for p, a in (("bf16", "fused"), ("fp32", "decomposed"))),
    _engine("tensorrt-rtx", "bf16", "plugin", "TensorRT headers", "CUDA headers", "cmake"),
    Proof(
        "tensorrt: device memory over 2000 changes of shape, with each plugin and without",
        ("gpu", "tensorrt", "TensorRT headers", "CUDA headers", "cmake"),
        tuple(
            step
            for attention in ("quick", "plugin", "decomposed")
            for step in (
                ("stca", *_BUILD, "tensorrt", "--precision", "fp16", "--lowering", attention, "--no-cache"),
                (*_PYTHON, "memory", "{bundle}"),
            )
        ),
    ),
    Proof(
        "onnxruntime on CUDA: built, right against float64",
        ("gpu", "onnxruntime-cuda"),
        _stca((*_BUILD, "onnxruntime", "--provider", "CUDAExecutionProvider", "--no-cache"), (*_VERIFY, "onnxruntime")),
    ),
)  # fmt: skip


def prove(
    here: Mapping[str, str | None],
    folder: Path,
    checkpoint: Path,
    *,
    proofs: Sequence[Proof] = PROOFS,
    limit: float = LIMIT_SECONDS,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Run what can run here.

    Args:
        here: for each need why it is missing on this machine; None where it is there.
        folder: for a bundle.
        checkpoint: what it is exported from.
        proofs: what to prove.
        limit: most seconds of one step.
        progress: told each proof as it starts.

    Returns:
        For each proof its `name`, its `status` (`passed`, `failed: …` or `not run: …`) and, if it ran, each step's
        command, seconds and the end of what it said.
    """
    found: list[dict[str, Any]] = []
    bundle: str | None = None
    for proof in proofs:
        missing = [why for need in proof.needs if (why := here.get(need, f"{need} is not known"))]
        if missing:
            found.append({"name": proof.name, "status": f"not run: {missing[0]}"})
            continue
        progress(proof.name)
        if bundle is None:
            bundle = _bundle(folder, checkpoint)
        found.append({"name": proof.name, **_run(proof, {"{bundle}": bundle, "{checkpoint}": str(checkpoint)}, limit)})
    return found


def _bundle(folder: Path, checkpoint: Path) -> str:
    out = str(folder / "bundle")
    done = _python("stca", "export", str(checkpoint), "--out", out)
    if done.returncode:
        raise BuildError(f"{checkpoint.name} is not exported here: {done.stderr.strip().splitlines()[-1:]}")
    return out


def _python(*words: str, limit: float = LIMIT_SECONDS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)


def _run(proof: Proof, places: Mapping[str, str], limit: float) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    for step in proof.steps:
        words = [places.get(word, word) for word in step]
        began = time.monotonic()
        try:
            done = _python(*words, limit=limit)
            code, said = str(done.returncode), (done.stdout + done.stderr)[-4000:]
        except subprocess.TimeoutExpired:
            code, said = f"none within {limit:.0f} s", ""
        steps.append({"command": words, "seconds": round(time.monotonic() - began, 1), "said": said})
        if code != "0":
            return {"status": f"failed: {' '.join(step[:3])} ended with exit status {code}", "steps": steps}
    return {"status": "passed", "steps": steps}


def _cases() -> list[tuple[Any, ...]]:
    """The operator's arguments on the GPU: both forms, each type, ragged requests with an empty one among them; and
    lists of segments, some of which two requests read."""
    import torch

    made: list[tuple[Any, ...]] = []
    lengths, targets = (777, 0, 129), (17, 3, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, key_heads, depth in ((8, 8, 32), (8, 1, 256)):

            def normal(rows: int, count: int, size: int = depth, kind: torch.dtype = dtype) -> Any:
                return torch.randn(rows, count, size, device="cuda").to(kind)

            key = normal(sum(lengths), key_heads)
            value = key if key_heads == 1 else normal(sum(lengths), key_heads)
            ends = [[0, *itertools.accumulate(x)] for x in (targets, lengths)]
            structure = [torch.tensor(x, dtype=torch.int32) for x in (*ends, lengths)]
            made.append((normal(sum(targets), heads), key, value, *(x.cuda() for x in structure), depth**-0.5))
            starts, used, lists = ([777, 0, 5, 300, 777, 906], [129, 70, 128, 477, 64], [0, 3, 3, 5])
            listed = [torch.tensor(x, dtype=torch.int32).cuda() for x in (starts, used, lists)]
            bias = torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0]).cuda()
            made.append((*made[-1][:4], *listed[:2], depth**-0.5, listed[2], bias))
    return made  # fmt: skip


def _held(case: tuple[Any, ...], out: Any) -> float:
    """The largest error against float64, in units of the type's rounding of the largest value."""
    import torch

    from stca.plugins import torch_op

    truth = torch_op.eager(*(x.double() for x in case[:3]), *case[3:])
    error = float((out.double() - truth).abs().max())
    allowed = 8 * torch.finfo(case[0].dtype).eps * float(truth.abs().max())
    if not error <= allowed:
        raise SystemExit(f"{case[0].dtype}, {tuple(case[1].shape)}: error {error:.2e}, allowed {allowed:.2e}")
    return error


def operator() -> None:
    """The torch op on CUDA against float64, on each case."""
    import torch

    print(json.dumps({"errors": [_held(c, torch.ops.stca.target_history_attention(*c)) for c in _cases()]}))


def embedded() -> None:
    """The ahead-of-time kernels, launched with exactly TensorRT's arguments, whole and in parts, against float64."""
    import torch

    from stca.plugins import aot, launch, ptx_launch, tiling

    errors = []
    for case in _cases():
        query, key, value, ends, begins, used, scale, *lists = case
        shape, device = launch.shape_of(query, key, value, bool(lists)), launch.device_of(query)
        sizes, sm = launch.sizes_of(query, key, ends), aot.artifact_sm(device.sm)
        for parts in (1, 4):
            (tile,) = aot.best_tiles(shape, scale, sizes, parts, sm, tiling.PORTABLE_SHARED_LIMIT, 1)
            plan = tiling.Plan(tile, parts, 0.0)
            out = query.new_full((len(query), query.shape[1], value.shape[2]), float("nan"))
            kernels = ptx_launch.load(shape, plan, sm, scale)
            steps = launch.launches(query, key, value, ends, begins, used, scale, plan, out, *lists)
            ptx_launch.run(steps, kernels, torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            errors.append(_held(case, out))
    print(json.dumps({"errors": errors}))


def memory(bundle: str, changes: int = 2000) -> None:
    """Device memory over many changes of shape: more than 1 KiB for each is a leak."""
    import numpy as np
    from cuda.bindings import runtime

    from stca import probe
    from stca.runtime import Request, Session

    session = Session.load(bundle, engine="tensorrt", precision="fp16", cache_bytes=0, native_code=True)
    specs, rng = session.manifest.graphs["request"].inputs, np.random.default_rng(0)
    two = [Request(probe.single(specs, n, m, rng), user="u", version=0) for n, m in ((100, 7), (301, 12))]

    def free() -> int:
        return int(runtime.cudaMemGetInfo()[1])

    for i in range(200):
        session.score(two[i % 2])
    before = free()
    for i in range(changes):
        session.score(two[i % 2])
    lost = (before - free()) / changes
    print(json.dumps({"changes": changes, "bytes_a_change": lost}))
    if lost > 1024:
        raise SystemExit(f"{lost:.0f} bytes of device memory are lost at each change of shape")


if __name__ == "__main__":
    _COMMANDS: dict[str, Callable[..., None]] = {f.__name__: f for f in (operator, embedded, memory)}
    _COMMANDS[sys.argv[1]](*sys.argv[2:])
