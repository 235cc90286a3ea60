"""What a hit costs the host in Python when TensorRT serves it, with a GPU that takes no time.

    python benchmarks/host_overhead_gpu.py [--history 10000] [--targets 300] [--out FILE]

The shipped checkpoint's session with its two halves as `TensorRTEngine`s over stand-ins: a library whose engines
compute nothing, and CUDA calls that return at once. What is timed is our own share of a request: validation, the
look-up of the state, staging, the replay of a CUDA graph, and the scores' way back. A real driver adds its own share to
each call, whose number is printed. One thread, pinned to one core, processor time. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from outcome import tell

import stca.runtime.model
from stca import probe
from stca.bundle import Bundle
from stca.checks.timing import machine
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import load_checkpoint
from stca.manifest import EngineEntry
from stca.report.demo import shipped_checkpoint
from stca.runtime import Request, Session
from stca.runtime.cuda_device import Device
from stca.runtime.tensorrt_engine import TensorRTEngine
from stca.specs import HALVES


class Cuda:
    """CUDA's runtime as far as engines call it. Memory is the host's; nothing is copied; calls are counted."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)
    cudaStreamNonBlocking = 1

    def __init__(self) -> None:
        self.calls = 0
        self._memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> tuple[int, int]:
            self.calls += 1
            return 0, 90

        self.__dict__[name] = call
        return call

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, 40 << 30, 80 << 30

    def cudaGetDevice(self) -> tuple[int, int]:
        self.calls += 1
        return 0, 0

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        self._memory.append((ctypes.c_uint8 * (size + 256))())
        return 0, -(-ctypes.addressof(self._memory[-1]) // 256) * 256

    def cudaHostAlloc(self, size: int, _: int) -> tuple[int, int]:
        return self.cudaMalloc(size)

    def cudaMallocAsync(self, size: int, _: int) -> tuple[int, int]:
        return self.cudaMalloc(size)


class Library:
    """TensorRT as far as an engine calls it."""

    __version__ = "0"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=0)

    class ILogger:
        INTERNAL_ERROR, ERROR = range(2)

    @staticmethod
    def Runtime(_: Any) -> Any:
        def fine(*_: Any) -> bool:
            return True

        context = SimpleNamespace(
            set_tensor_address=fine, set_device_memory=fine, set_input_shape=fine, execute_async_v3=fine
        )
        engine = SimpleNamespace(create_execution_context=lambda _: context, device_memory_size_v2=1)
        return SimpleNamespace(deserialize_cuda_engine=lambda _: engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--history", type=int, default=10_000)
    parser.add_argument("--targets", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cuda = Cuda()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(shipped_checkpoint())
        bundle = export_checkpoint(checkpoint, Path(folder, "B"), prove=lambda *_: {"passed": True})
        stca.runtime.model.open_engines = lambda b, *_, **__: _engines(b, cuda, args.history, args.targets)
        session = Session.load(bundle.path, engine="graphs")
    specs = session.manifest.graphs["request"].inputs
    whole = probe.single(specs, args.history, args.targets, np.random.default_rng(0))
    of_user = {s.name for s in specs if s.scope == "user"}
    session.score(Request(whole, "ann", "v1"))
    request = Request({name: x for name, x in whole.items() if name not in of_user}, "ann", "v1")
    for _ in range(200):
        session.score(request)
    rounds, calls, ends = [], cuda.calls, time.monotonic() + args.seconds
    count = 0
    while time.monotonic() < ends:
        began = time.process_time()
        for _ in range(1000):
            session.score(request)
        rounds.append((time.process_time() - began) * 1e3)
        count += 1000
    result = {
        "history": args.history,
        "targets": args.targets,
        "state_bytes": session.stats().state_bytes,
        "machine": {**machine(1), "load": os.getloadavg()[0]},
        "microseconds": round(float(np.median(rounds)), 1),
        "fastest_round": round(min(rounds), 1),
        "cuda_calls": (cuda.calls - calls) / count,
    }
    tell(result, args.out)


def _engines(bundle: Bundle, cuda: Cuda, history: int, targets: int) -> dict[str, TensorRTEngine]:
    device, engines = Device(cuda=cuda), {}
    largest = {"N_h": history, "N_t": targets, "B": 1, "B_plus_1": 2}
    for half in HALVES:
        graph = bundle.manifest.graphs[half]
        entry = {
            "graph": half,
            "file": graph.file,
            "flavour": "tensorrt",
            "version": Library.__version__,
            "sm": device.sm,
            "precision": "fp32",
            "requests": 1,
            "profiles": [{d: [1, n, n] for d, n in largest.items() if any(d in t.shape for t in graph.inputs)}],
            "inputs": [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in graph.inputs],
            "outputs": [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in graph.outputs],
        }
        entry["padded"] = [d for d in ("N_h", "N_t") if d in entry["profiles"][0]]
        keep = [s.name for s in bundle.manifest.state]
        engines[half] = TensorRTEngine(bundle.file(half), EngineEntry.of(entry), device, keep=keep, module=Library)
    return engines


if __name__ == "__main__":
    main()
