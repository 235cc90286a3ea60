"""What TensorRT engines need of CUDA: a stream, memory, arrays on the GPU, and that all of it is given back."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stca.errors import BuildError, EngineError


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
    """A GPU's stream and what the engines on it share: scratch memory, and a lock, since they run one after the other.

    Attributes:
        index: which GPU, as CUDA counts those it may see.
        sm: compute capability, 90 for 9.0.
        stream: all work goes there, but for what is recorded: the caller may have work of its own on a stream it gave.
        scratch: address of memory that engines use by turns; it moves when an engine that needs more is loaded.
        scratch_bytes: how much it is.
        lock: held by whoever uses the stream; see `use`.

    Args:
        index: which GPU. A thread's own current device is left as it was.
        stream: the caller's CUDA stream, which must outlive the engines; None makes one.
        cuda: stands in for `cuda.bindings.runtime`.

    Raises:
        BuildError: when there is no such GPU, no driver or no `cuda-bindings`.
    """

    def __init__(self, index: int = 0, stream: int | None = None, *, cuda: Any = None) -> None:
        if cuda is None:
            try:
                cuda = importlib.import_module("cuda.bindings.runtime")
            except ImportError as e:
                raise BuildError(f"TensorRT engines need the CUDA bindings ({e}): pip install cuda-bindings") from e
        self.cuda, self.index, self.lock, self._owned = cuda, index, threading.RLock(), Owned(self, cuda)
        count = int(self.call("cudaGetDeviceCount"))
        if not 0 <= index < count:
            raise BuildError(f"there is no GPU {index} here, the last is {count - 1}")
        with self.use():
            self._open(stream)
        self._garbage: collections.deque[int] = collections.deque()
        weakref.finalize(self, _free_arrays, cuda, self._garbage, self.stream)

    def _open(self, stream: int | None) -> None:
        cuda, which = self.cuda, self.cuda.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, self.index)
            for attribute in (which.cudaDevAttrComputeCapabilityMajor, which.cudaDevAttrComputeCapabilityMinor)
        )
        self.sm = 10 * int(major) + int(minor)
        self._recording_stream = self._new_stream()
        self.stream = self._new_stream() if stream is None else stream
        self.scratch, self.scratch_bytes = 0, 0
        # Unless told otherwise, the pool gives free memory back to the driver whenever a run is waited for.
        pool = self.call("cudaDeviceGetDefaultMemPool", self.index)
        keep = importlib.import_module("cuda.bindings.driver").cuuint64_t(1 << 63)
        self.call("cudaMemPoolSetAttribute", pool, cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold, keep)

    def _new_stream(self) -> int:
        """One that ignores the legacy stream: others' work there would fail while a graph is captured here."""
        made = self.call("cudaStreamCreateWithFlags", self.cuda.cudaStreamNonBlocking)
        return int(self._owned.add("cudaStreamDestroy", made))

    def record(self, work: Callable[[int], None]) -> Any:
        """What `work` enqueues on the stream that it is given, as an executable CUDA graph; with the lock.

        Raises:
            BuildError: when it cannot be captured; CUDA's last error is taken then, so that no later call reports it.
        """
        stream, mode = self._recording_stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self.call("cudaStreamBeginCapture", stream, mode)
            try:
                work(stream)
            finally:
                captured = self.call("cudaStreamEndCapture", stream)
            try:
                return self.call("cudaGraphInstantiate", captured, 0)
            finally:
                self.call("cudaGraphDestroy", captured)
        except BaseException:
            self.cuda.cudaGetLastError()
            raise

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Hold the lock, with this GPU as the thread's current one: memory and launches go to whatever is current."""
        with self.lock:
            before = int(self.call("cudaGetDevice"))
            if before != self.index:
                self.call("cudaSetDevice", self.index)
            try:
                yield
            finally:
                if before != self.index:
                    self.call("cudaSetDevice", before)

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
        with self.use():
            if size <= self.scratch_bytes and self.scratch:
                return
            larger = self.memory(self._owned, size)  # first, so that without room for it all stays as it was
            if self.scratch:
                self._owned.drop("cudaFree", self.scratch)
            self.scratch, self.scratch_bytes = larger, size

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """An array that is not written yet, from CUDA's pool: its memory follows the stream's order."""
        address = int(self.call("cudaMallocAsync", max(1, math.prod(shape) * dtype.itemsize), self.stream))
        return DeviceArray(self, address, shape, dtype, None)

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes from one device address to another."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def collect(self) -> None:
        """Give back the memory of arrays that are garbage; to be called with the lock.

        They cannot do it themselves: whatever is enqueued while a graph is being captured becomes part of the graph.
        """
        _free_arrays(self.cuda, self._garbage, self.stream)


def _free_arrays(cuda: Any, garbage: collections.deque[int], stream: int) -> None:
    while garbage:
        with contextlib.suppress(Exception):
            cuda.cudaFreeAsync(garbage.popleft(), stream)


class DeviceArray:
    """Rows on the GPU. Written once, by the stream of its device; sliced along the first axis like a numpy array.

    Attributes:
        address: of the first element.
        shape, dtype, itemsize, nbytes: as numpy's; bfloat16 is uint16.
    """

    def __init__(
        self, device: Device, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], whole: DeviceArray | None
    ) -> None:
        self._device, self.address, self.shape, self.dtype, self._whole = device, address, shape, dtype, whole
        self.itemsize = dtype.itemsize
        self.nbytes = math.prod(shape) * dtype.itemsize
        if whole is None:
            weakref.finalize(self, device._garbage.append, address).atexit = False  # the pool ends with the process

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Rows one after the other, in the same memory."""
        start, stop, _ = rows.indices(len(self))
        shape = (max(0, stop - start), *self.shape[1:])
        address = self.address + start * math.prod(self.shape[1:]) * self.itemsize
        return DeviceArray(self._device, address, shape, self.dtype, self._whole or self)

    def copy(self) -> DeviceArray:
        """The same values in memory of their own; see `join_on_device`."""
        return join_on_device([self])

    def to_host(self) -> NDArray[Any]:
        """The values as a numpy array; waits for the stream."""
        values, device = np.empty(self.shape, self.dtype), self._device
        kind = device.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        with device.use():
            device.call("cudaMemcpyAsync", values.ctypes.data, self.address, self.nbytes, kind, device.stream)
            device.call("cudaStreamSynchronize", device.stream)
        return values


def join_on_device(parts: Sequence[DeviceArray]) -> DeviceArray:
    """Rows of all parts, one part after the other.

    Raises:
        EngineError: when there is no room for them.
    """
    device = parts[0]._device
    try:
        with device.use():
            device.collect()
            joined = device.array((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
            at = joined.address
            for part in parts:
                if part.nbytes:
                    device.copy(at, part.address, part.nbytes)
                at += part.nbytes
    except BuildError as e:  # CUDA failed, and not while an engine was made
        raise EngineError(f"states cannot be joined: {e}") from e
    return joined


_shared: dict[int, weakref.ref[Device]] = {}
_making = threading.Lock()


def shared_device(index: int = 0) -> Device:
    """The device of all sessions of this process on one GPU, for as long as an engine or a state is on it.

    A swap would otherwise need scratch memory for two bundles, and states that outlive one would keep both.

    Raises:
        BuildError: as `Device`.
    """
    with _making:
        held = _shared.get(index)
        device = held() if held is not None else None
        if device is None:
            device = Device(index)
            _shared[index] = weakref.ref(device)
        return device
