"""CUDA's runtime without a GPU: memory on two sides that only copies connect, streams, graphs, a count of it all."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace


class FakeCuda:
    """Memory, copies that take effect in stream order, graphs that replay what was captured, and a count of it all."""

    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)

    def __init__(self, sm=89, fail=None):
        self.sm, self.fail, self.log, self.largest = sm, fail or {}, [], 1 << 40
        self.free = (40 << 30, 80 << 30)  # and in all
        self.memory, self.pinned, self.graphs, self.streams = {}, {}, [], 0
        self.queue, self.captured, self.device, self.devices, self.error = [], None, 0, 1, 0

    def __getattribute__(self, name):
        if not name.startswith("cuda") or hasattr(FakeCuda, name):
            return object.__getattribute__(self, name)

        def call(*args):
            self.log.append(name)
            if name in self.fail:
                self.error = 2
                return (Failure(self.fail[name]),)
            if "alloc" in name.lower() and args[0] > self.largest:
                return (Failure("cudaErrorMemoryAllocation"),)
            value = object.__getattribute__(self, "_" + name)(*args)
            return (0,) if value is None else (0, value)

        return call

    @property
    def held(self):
        """What nobody has given back yet."""
        return len(self.memory), len(self.pinned), len(self.graphs), self.streams

    def submit(self, work, stream=77):
        assert self.device == self.devices - 1, "not on the GPU that was asked for"
        (self.captured if stream == 78 and self.captured is not None else self.queue).append(work)

    def allocate(self, where, size):
        assert self.device == self.devices - 1, "not on the GPU that was asked for"
        raw = bytearray(b"\xee" * (size + 256))  # CUDA's memory begins at multiples of 256
        start = -ctypes.addressof((ctypes.c_uint8 * 1).from_buffer(raw)) % 256
        block = (ctypes.c_uint8 * size).from_buffer(raw, start)
        where[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cudaGetDeviceCount(self):
        return self.devices

    def _cudaGetDevice(self):
        return self.device

    def _cudaSetDevice(self, device):
        self.device = device

    def _cudaGetLastError(self):
        self.error = 0

    def _cudaDeviceGetAttribute(self, attribute, device):
        assert device == self.devices - 1
        return divmod(self.sm, 10)[attribute]

    def _cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        self.streams += 1
        return 79 - self.streams  # 78, for what is recorded, then 77

    def _cudaStreamDestroy(self, stream):
        assert stream in (77, 78)
        self._cudaStreamSynchronize(stream)
        self.streams -= 1

    def _cudaMalloc(self, size):
        return self.allocate(self.memory, size)

    def _cudaHostAlloc(self, size, flags):
        return self.allocate(self.pinned, size)

    def _cudaFree(self, address):
        self._cudaStreamSynchronize(77)  # as CUDA does
        del self.memory[address]

    def _cudaFreeHost(self, address):
        self._cudaStreamSynchronize(77)
        del self.pinned[address]

    def _cudaMallocAsync(self, size, stream):
        assert self.captured is None
        return self.allocate(self.memory, size)

    def _cudaFreeAsync(self, address, stream):
        assert self.captured is None
        self.queue.append(lambda: self.memory.pop(address))

    def _cudaMemGetInfo(self):
        return self.free

    def _cudaDeviceGetDefaultMemPool(self, device):
        return 5

    def _cudaMemPoolSetAttribute(self, pool, attribute, value):
        assert (pool, attribute, int(value)) == (5, 4, 1 << 63)

    def on_device(self, address, size):
        return any(block <= address and address + size <= block + len(x) for block, x in self.memory.items())

    def _cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert stream in (77, 78)
        assert (self.on_device(source, size), self.on_device(target, size)) == (kind != 1, kind != 2)
        self.submit(lambda: ctypes.memmove(target, source, size), stream)

    def _cudaMemsetAsync(self, address, value, size, stream):
        assert self.on_device(address, size)
        self.submit(lambda: ctypes.memset(address, value, size), stream)

    def _cudaStreamSynchronize(self, stream):
        for work in self.queue:
            work()
        self.queue.clear()

    def _cudaStreamBeginCapture(self, stream, mode):
        assert stream == 78
        assert not self.queue
        self.captured = []

    def _cudaStreamEndCapture(self, stream):
        graph, self.captured = self.captured, None
        self.graphs.append(graph)
        return graph

    def _cudaGraphInstantiate(self, graph, flags):
        self.graphs.append(executable := list(graph))
        return executable

    def _cudaGraphDestroy(self, graph):
        self._cudaGraphExecDestroy(graph)

    def _cudaGraphLaunch(self, graph, stream):
        self.queue.extend(graph)

    def _cudaGraphExecDestroy(self, graph):
        self.graphs[:] = [g for g in self.graphs if g is not graph]
        graph.clear()


class Failure(int):
    def __new__(cls, name):
        made = int.__new__(cls, 2)
        made.name = name
        return made


# Of a stand-in for the library.
IO_MODE = SimpleNamespace(INPUT="input", OUTPUT="output")


def tensors_of(inputs, outputs):
    """What a library's engine says of itself, `(name, dtype, shape)` each; sizes by name vary."""
    words = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    told = {}
    for mode, specs in (("input", inputs), ("output", outputs)):
        told |= {n: (mode, words.get(d, d.upper()), s) for n, d, s in specs}
    return {
        "num_io_tensors": len(told),
        "get_tensor_name": list(told).__getitem__,
        "get_tensor_mode": lambda name: told[name][0],
        "get_tensor_dtype": lambda name: SimpleNamespace(name=told[name][1]),
        "get_tensor_shape": lambda name: [-1 if isinstance(n, str) else n for n in told[name][2]],
    }
