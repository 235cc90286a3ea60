"""What TensorRT engines need of CUDA: a stream, memory, and that all of it is given back."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stca.errors import BuildError


class Owned:
    """What one object got from CUDA. It is given back, newest first, when the object is garbage or the process ends.

    Args:
        owner: the object.
        cuda: the bindings.
    """

    def __init__(self, owner: object, cuda: Any) -> None:
        self._cuda, self._held = cuda, list[tuple[str, Any]]()
        weakref.finalize(owner, _give_back, cuda, self._held)

    def add(self, give_back: str, resource: Any) -> Any:
        """Keep `resource`, which the CUDA function named `give_back` takes back; returns it."""
        self._held.append((give_back, resource))
        return resource

    def drop(self, give_back: str, resource: Any) -> None:
        """Give one back now."""
        self._held.remove((give_back, resource))
        _give_back(self._cuda, [(give_back, resource)])


def _give_back(cuda: Any, held: list[tuple[str, Any]]) -> None:
    while held:
        function, resource = held.pop()
        # Nobody is left to be told, and a driver that shuts down has taken everything back already.
        with contextlib.suppress(Exception):
            getattr(cuda, function)(resource)


class Device:
    """A stream and what the engines on it share: scratch memory, and a lock, since they run one after the other.

    Attributes:
        sm: compute capability, 90 for 9.0.
        stream: all work goes there.
        scratch: address of memory that engines use by turns; it moves when an engine that needs more is loaded.
        scratch_bytes: how much it is.
        lock: held by whoever uses the stream.

    Args:
        stream: the caller's CUDA stream, which must outlive the engines; None makes one.
        cuda: stands in for `cuda.bindings.runtime`.

    Raises:
        BuildError: when there is no GPU, no driver or no `cuda-bindings`.
    """

    def __init__(self, stream: int | None = None, *, cuda: Any = None) -> None:
        if cuda is None:
            try:
                cuda = importlib.import_module("cuda.bindings.runtime")
            except ImportError as e:
                raise BuildError(f"TensorRT engines need the CUDA bindings ({e}): pip install cuda-bindings") from e
        self.cuda, self.lock, self._owned = cuda, threading.RLock(), Owned(self, cuda)
        which = cuda.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (which.cudaDevAttrComputeCapabilityMajor, which.cudaDevAttrComputeCapabilityMinor)
        )
        self.sm = 10 * int(major) + int(minor)
        if stream is None:
            stream = int(self._owned.add("cudaStreamDestroy", self.call("cudaStreamCreate")))
        self.stream, self.scratch, self.scratch_bytes = stream, 0, 0

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a CUDA function and return its result.

        Raises:
            BuildError: with CUDA's own name for what went wrong.
        """
        error, *results = getattr(self.cuda, function)(*arguments)
        if int(error) != 0:
            name = getattr(error, "name", str(error))
            if "MemoryAllocation" in name:
                raise BuildError("the GPU is out of memory; build for smaller sizes, or free some of it")
            if name in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice"):
                raise BuildError(f"no usable NVIDIA GPU or driver here ({name}); serve with ONNX Runtime")
            raise BuildError(f"CUDA failed in {function}: {name}")
        return results[0] if len(results) == 1 else results

    def memory(self, owned: Owned, size: int) -> int:
        """Address of `size` bytes on the device."""
        return int(owned.add("cudaFree", int(self.call("cudaMalloc", max(1, size)))))

    def pinned(self, owned: Owned, size: int) -> NDArray[np.uint8]:
        """`size` bytes of page-locked host memory, `(size,)`."""
        address = owned.add("cudaFreeHost", int(self.call("cudaHostAlloc", max(1, size), 0)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(address))

    def reserve(self, size: int) -> None:
        """Make the scratch memory at least `size` bytes; engines that hold its old address look before they run."""
        with self.lock:
            if size <= self.scratch_bytes and self.scratch:
                return
            if self.scratch:
                self._owned.drop("cudaFree", self.scratch)
                self.scratch, self.scratch_bytes = 0, 0
            self.scratch, self.scratch_bytes = self.memory(self._owned, size), size
