"""An engine of TensorRT without the library or a GPU: a plan that echoes its state, with `fake_cuda` beneath it."""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from types import SimpleNamespace

import numpy as np
from support.fake_cuda import IO_MODE, FakeCuda, tensors_of

from stca.manifest import EngineEntry
from stca.runtime.cuda_device import Device
from stca.runtime.tensorrt_engine import TensorRTEngine

ENTRY = EngineEntry.of(
    {
        "graph": "target_scorer",
        "file": "target_scorer.tensorrt-rtx.sm89.bf16.plan",
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "sm": 89,
        "precision": "bf16",
        "requests": 1,
        "profiles": [{"N_h": [1, 8, 8], "N_t": [1, 4, 4]}, {"N_h": [9, 64, 64], "N_t": [1, 4, 4]}],
        "inputs": [
            {"name": "state", "dtype": "bfloat16", "shape": ["N_h", 2]},
            {"name": "offsets", "dtype": "int32", "shape": [2]},
            {"name": "target", "dtype": "int64", "shape": ["N_t"]},
        ],
        "outputs": [
            {"name": "scores", "dtype": "float32", "shape": ["N_t", 2]},
            {"name": "echo", "dtype": "bfloat16", "shape": ["N_h", 2]},
        ],
    }
)


class FakeTensorRT:
    """`scores[t] = (target[t], offsets[1])`, `echo = state`; it wants its calls in TensorRT's order."""

    __version__ = "1.7.1.116"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    LayerInformationFormat = SimpleNamespace(JSON=1)
    TensorIOMode = IO_MODE

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, cuda, says=None, scratch=64, fails=False, library=False):
        self.library = library  # whether the plan carries code of ours
        self.inputs, self.outputs = ([tuple(t.values()) for t in ts] for ts in (ENTRY.inputs, ENTRY.outputs))
        self.cuda, self.says, self.scratch, self.fails = cuda, says, scratch, fails
        self.contexts = weakref.WeakSet()

    def Runtime(self, log):
        def deserialize(plan):
            assert runtime.engine_host_code_allowed == self.library
            if self.says is not None:
                log.log(self.ILogger.ERROR, self.says)
                return None
            assert plan == b"plan"
            told = SimpleNamespace(get_engine_information=lambda _: '{"Layers": ["fused"]}')
            return SimpleNamespace(
                create_execution_context=self.context,
                create_runtime_config=FakeConfig,
                create_engine_inspector=lambda: told,
                device_memory_size_v2=self.scratch,
                **tensors_of(self.inputs, self.outputs),
            )

        runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return runtime

    def context(self, how):
        assert how == "user" or (how.strategy, how.cuda_graph_strategy) == ("user", "whole")
        made = FakeContext(self)
        self.contexts.add(made)
        return made


class FakeConfig:
    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class FakeContext:
    """What it captured holds for the shapes it then had, on the first run of which it does things it does only once."""

    def __init__(self, trt):
        self.trt, self.addresses, self.shapes, self.profile, self.scratch = trt, {}, {}, 0, None
        self.generation, self.settled = 0, False

    def set_tensor_address(self, name, address):
        assert address in self.trt.cuda.memory
        self.addresses[name] = address
        return True

    def set_device_memory(self, address, size):
        assert size >= self.trt.scratch
        self.scratch = address
        self.generation += 1

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile
        self.generation += 1
        return True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        self.generation += 1
        self.settled = False
        return True

    def execute_async_v3(self, stream):
        cuda, generation = self.trt.cuda, self.generation
        assert self.scratch in cuda.memory
        assert cuda.captured is None or self.settled
        self.settled = True
        tokens, targets, profile = self.shapes["state"][0], self.shapes["target"][0], self.profile
        low, _, high = ENTRY.profiles[profile]["N_h"]
        assert low <= tokens <= high
        context, addresses, scratch = weakref.ref(self), dict(self.addresses), self.scratch

        def view(name, count, dtype):
            size = count * np.dtype(dtype).itemsize
            return np.frombuffer((ctypes.c_uint8 * size).from_address(addresses[name]), dtype)

        def work():
            assert scratch in cuda.memory
            assert context().generation == generation  # of a graph too: its context must be as it was
            scores = view("scores", 2 * targets, np.float32).reshape(-1, 2)
            scores[:, 0], scores[:, 1] = view("target", targets, np.int64), view("offsets", 2, np.int32)[1]
            view("echo", 2 * tokens, np.uint16)[:] = view("state", 2 * tokens, np.uint16)

        self.trt.cuda.submit(work, stream)
        return not self.trt.fails


CAPTURED = dataclasses.replace(ENTRY, flavour="tensorrt", file=ENTRY.file.replace("-rtx", ""))


def make(tmp_path, *, graphs=16, keep=(), device=None, entry=CAPTURED, **fake):
    (tmp_path / "p").write_bytes(b"plan")
    device = device or Device(cuda=FakeCuda())
    module = FakeTensorRT(device.cuda, **fake)
    return TensorRTEngine(tmp_path / "p", entry, device, keep=keep, graphs=graphs, module=module)


def request(tokens, targets, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "state": rng.integers(0, 1 << 16, (tokens, 2)).astype(np.uint16),
        "offsets": np.array([0, tokens], np.int32),
        "target": rng.integers(0, 1000, targets),
        "unused": np.zeros(1),
    }
