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
        self.memory, self.pinned, self.graphs, self.streams = {}, {}, [], 0
        self.queue, self.captured = [], None

    def __getattribute__(self, name):
        if not name.startswith("cuda") or hasattr(FakeCuda, name):
            return object.__getattribute__(self, name)

        def call(*args):
            self.log.append(name)
            if name in self.fail:
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

    def submit(self, work):
        (self.captured if self.captured is not None else self.queue).append(work)

    def allocate(self, where, size):
        block = (ctypes.c_uint8 * size).from_buffer(bytearray(b"\xee" * size))
        where[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cudaDeviceGetAttribute(self, attribute, device):
        return divmod(self.sm, 10)[attribute]

    def _cudaStreamCreateWithFlags(self, flags):
        assert flags == self.cudaStreamNonBlocking
        self.streams += 1
        return 77

    def _cudaStreamDestroy(self, stream):
        assert stream == 77
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

    def _cudaDeviceGetDefaultMemPool(self, device):
        return 5

    def _cudaMemPoolSetAttribute(self, pool, attribute, value):
        assert (pool, attribute, int(value)) == (5, 4, 1 << 63)

    def on_device(self, address, size):
        return any(block <= address and address + size <= block + len(x) for block, x in self.memory.items())

    def _cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert stream == 77
        assert (self.on_device(source, size), self.on_device(target, size)) == (kind != 1, kind != 2)
        self.submit(lambda: ctypes.memmove(target, source, size))

    def _cudaMemsetAsync(self, address, value, size, stream):
        assert self.on_device(address, size)
        self.submit(lambda: ctypes.memset(address, value, size))

    def _cudaStreamSynchronize(self, stream):
        for work in self.queue:
            work()
        self.queue.clear()

    def _cudaStreamBeginCapture(self, stream, mode):
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
