"""A half in TensorRT or TensorRT-RTX: buffers made once, nothing allocated on the device or pinned while requests run.

Written against the documented API and tested with stand-ins for the library and for CUDA. It has not run on a GPU yet.

bfloat16 values are `uint16` arrays of their bits, because numpy has no bfloat16; a state goes in as it came out. An
empty history is run as one token of zeros that the offsets leave out, since an engine's smallest history is one token.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stca.bundle import ITEM_BYTES
from stca.errors import BuildError, EngineError, RequestError
from stca.tensorrt_flavours import FLAVOURS, load

Array = NDArray[Any]
Entry = Mapping[str, Any]

TOKENS, TARGETS = "N_h", "N_t"
# What a library says when it refuses a plan, and what that means; the first that fits.
_REFUSALS: Final = (
    (("plugin", "getcreator"), "needs a plugin that is not registered; load its library before the engine"),
    (("out of memory", "outofmemory", "memory allocation"), "does not fit the GPU's memory; build for smaller sizes"),
    (("version", "incompatible"), "was built by another version of the library; run `stca build` again"),
    (
        ("compute capability", "different device", "platform"),
        "was built for another GPU; run `stca build` with its --sm",
    ),
    (("magic", "truncated", "corrupt", "malformed", "deserializ"), "is damaged; copy the bundle again"),
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """How values of a manifest's dtype are held on the host."""
    return np.dtype(np.uint16 if name == "bfloat16" else name)


def check_fit(entry: Entry, version: str, sm: int) -> None:
    """Whether an engine may be loaded here at all.

    Raises:
        BuildError: for another version of the library, or another GPU.
    """
    what, again = entry["file"], f"run `stca build` again with --engine {entry['flavour']}"
    if entry["version"] != version:
        made = f"{entry['flavour']} {entry['version']}"
        raise BuildError(f"{what} was built with {made}, here is {version}; install that one, or {again}")
    if entry["sm"] != sm:
        raise BuildError(f"{what} was built for SM {entry['sm']}, this GPU is SM {sm}; {again} --sm {sm}")


def explain_refusal(entry: Entry, said: Sequence[str]) -> str:
    """One line for a plan that the library would not load, from what it logged."""
    text = " ".join(said).lower()
    for signs, meaning in _REFUSALS:
        if any(sign in text for sign in signs):
            return f"{entry['file']} {meaning}"
    return (
        f"{entry['file']} cannot be loaded: {' '.join(' '.join(said).split())[:300] or 'the library gives no reason'}"
    )


def choose_profile(entry: Entry, sizes: Mapping[str, int]) -> int:
    """The tightest optimization profile that admits these sizes.

    Raises:
        RequestError: naming the dimension, its size and the limit.
    """
    profiles: Sequence[Mapping[str, Sequence[int]]] = entry["profiles"]
    fits = [
        (math.prod(p[d][2] for d in p), i)
        for i, p in enumerate(profiles)
        if all(p[d][0] <= sizes.get(d, p[d][0]) <= p[d][2] for d in p)
    ]
    if fits:
        return min(fits)[1]
    for dim, size in sizes.items():
        limits = [p[dim] for p in profiles if dim in p]
        if limits and size > (most := max(limit[2] for limit in limits)):
            raise RequestError(
                f"{dim} is {size}, {entry['file']} was built for at most {most}; send less, or build for more"
            )
    raise RequestError(f"no profile of {entry['file']} admits {dict(sizes)}; build with a profile for it")


def sizes_of(entry: Entry, inputs: Mapping[str, Array]) -> dict[str, int]:
    """The symbolic sizes of one run, from its inputs.

    Raises:
        RequestError: when an input is missing or has another shape or width than the engine's.
    """
    sizes: dict[str, int] = {}
    alone = " and serves one request per run" if entry["requests"] == 1 else ""
    for spec in entry["inputs"]:
        name, shape = spec["name"], spec["shape"]
        if name not in inputs:
            raise RequestError(f"{name}: is missing; the engine needs it")
        x = inputs[name]
        if x.itemsize != ITEM_BYTES[spec["dtype"]]:
            raise RequestError(f"{name}: has dtype {x.dtype}, the engine takes {spec['dtype']}")
        if x.ndim != len(shape):
            raise RequestError(f"{name}: has shape {list(x.shape)}, the engine takes {list(shape)}{alone}")
        for n, size in zip(x.shape, shape, strict=True):
            if n != (sizes.setdefault(size, n) if isinstance(size, str) else size):
                raise RequestError(f"{name}: has shape {list(x.shape)}, the engine takes {list(shape)}{alone}")
    return sizes


class Device:
    """A stream and what the engines on it share: scratch memory, and a lock, since they run one after the other.

    Args:
        stream: the caller's CUDA stream; None makes one.
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
        self.cuda = cuda
        self.lock = threading.RLock()
        which = cuda.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", attribute, 0)
            for attribute in (which.cudaDevAttrComputeCapabilityMajor, which.cudaDevAttrComputeCapabilityMinor)
        )
        self.sm = 10 * int(major) + int(minor)
        self.stream = int(self.call("cudaStreamCreate")) if stream is None else stream
        self._scratch, self._scratch_bytes = 0, 0

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

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        return int(self.call("cudaMalloc", max(1, size)))

    def pinned(self, size: int) -> Array:
        """`size` bytes of page-locked host memory, `(size,)` uint8."""
        address = int(self.call("cudaHostAlloc", max(1, size), 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size)).from_address(address))

    def scratch(self, size: int) -> int:
        """Address of at least `size` bytes that engines use by turns."""
        if size > self._scratch_bytes:
            if self._scratch:
                self.call("cudaFree", self._scratch)
            self._scratch, self._scratch_bytes = self.allocate(size), size
        return self._scratch


@dataclass
class _Buffer:
    """One input or output: page-locked on the host, and on the device, as large as the profiles allow."""

    spec: Mapping[str, Any]
    host: Array
    address: int

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[n] if isinstance(n, str) else n for n in self.spec["shape"])

    def bytes(self, sizes: Mapping[str, int]) -> int:
        return math.prod(self.shape(sizes)) * ITEM_BYTES[self.spec["dtype"]]


class TensorRTEngine:
    """One half of a bundle in TensorRT or TensorRT-RTX; see `stca.runtime.engine.Engine`.

    Threads take turns. Shapes that come again are replayed as CUDA graphs.

    Args:
        plan: the engine's file. Its digest must be in the manifest: loading a plan runs code.
        entry: what the manifest says of it.
        device: shared by the engines of one session, so that they share scratch memory.
        graphs: CUDA graphs to keep, by shape; 0 captures none.
        module: stands in for the library.

    Raises:
        BuildError: when the engine cannot run here; one line that says why and what to do.
    """

    def __init__(
        self, plan: str | os.PathLike[str], entry: Entry, device: Device, *, graphs: int = 16, module: Any = None
    ) -> None:
        flavour = FLAVOURS[entry["flavour"]]
        trt = module if module is not None else load(flavour)
        check_fit(entry, trt.__version__, device.sm)
        self._entry, self._device, self._limit = entry, device, graphs
        self.name = f"{flavour.name} {entry['version']} (SM {entry['sm']}, {entry['precision']})"
        self.outputs = tuple(o["name"] for o in entry["outputs"])
        said: list[str] = []
        engine = trt.Runtime(_logger(trt, said)).deserialize_cuda_engine(Path(plan).read_bytes())
        if engine is None:
            raise BuildError(explain_refusal(entry, said))
        self._said, self._engine, self._json = said, engine, trt.LayerInformationFormat.JSON
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise BuildError(explain_refusal(entry, [*said, "out of memory"]))
        self._scratch = 0
        largest = {d: max(p[d][2] for p in entry["profiles"] if d in p) for p in entry["profiles"] for d in p}
        self._buffers: dict[str, _Buffer] = {}
        for spec in (*entry["inputs"], *entry["outputs"]):
            buffer = _Buffer(spec, np.empty(0, np.uint8), 0)
            buffer.host = device.pinned(buffer.bytes(largest))
            buffer.address = device.allocate(buffer.bytes(largest))
            self._buffers[spec["name"]] = buffer
            self._context.set_tensor_address(spec["name"], buffer.address)
        self._profile = 0
        self._seen: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`; inputs the engine does not have are left aside.

        Raises:
            RequestError: when a size is beyond the engine's profiles.
            EngineError: when the run fails.
        """
        sizes = sizes_of(self._entry, inputs)
        if sizes.get(TARGETS) == 0:
            return {o["name"]: self._empty(o, sizes) for o in self._entry["outputs"]}
        empty = sizes.get(TOKENS) == 0
        run_sizes = {**sizes, TOKENS: 1} if empty else sizes
        profile = choose_profile(self._entry, run_sizes)
        with self._device.lock:
            self._stage(inputs, run_sizes)
            self._execute(profile, run_sizes)
            out = {}
            for name in self.outputs:
                buffer = self._buffers[name]
                shape = buffer.shape(run_sizes)
                values = buffer.host[: buffer.bytes(run_sizes)].view(numpy_dtype(buffer.spec["dtype"])).reshape(shape)
                per_token = empty and TOKENS in buffer.spec["shape"][:1]
                out[name] = values[:0].copy() if per_token else values.copy()
            return out

    def inspect(self) -> dict[str, Any]:
        """What the library tells of the engine: `layers`, after fusion, and `device_memory` in bytes."""
        told = json.loads(self._engine.create_engine_inspector().get_engine_information(self._json))
        return {"layers": told["Layers"], "device_memory": int(self._engine.device_memory_size_v2)}

    def _empty(self, spec: Mapping[str, Any], sizes: Mapping[str, int]) -> Array:
        return np.zeros([sizes[n] if isinstance(n, str) else n for n in spec["shape"]], numpy_dtype(spec["dtype"]))

    def _stage(self, inputs: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
        """Copy inputs into page-locked memory; a missing row, that of an empty history, is zeros."""
        for spec in self._entry["inputs"]:
            buffer, x = self._buffers[spec["name"]], inputs[spec["name"]]
            buffer.host[x.nbytes : buffer.bytes(sizes)] = 0
            buffer.host[: x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)

    def _execute(self, profile: int, sizes: Mapping[str, int]) -> None:
        device, key = self._device, (profile, *sizes.values())
        graph = self._seen.get(key)
        scratch = device.scratch(int(self._engine.device_memory_size_v2))
        if scratch != self._scratch:  # another engine made it grow: graphs hold the old address
            self._scratch = scratch
            self._context.set_device_memory(scratch, int(self._engine.device_memory_size_v2))
            self._seen.clear()
            graph = None
        if graph is not None:
            self._seen.move_to_end(key)
            device.call("cudaGraphLaunch", graph, device.stream)
        else:
            self._set_shapes(profile, sizes)
            self._enqueue(sizes)
        device.call("cudaStreamSynchronize", device.stream)
        if graph is None and self._limit:
            if key in self._seen:  # the second time, with TensorRT's own state settled by the run just done
                self._seen[key] = self._capture(sizes)
            else:
                self._seen[key] = None
            while len(self._seen) > self._limit:
                _, old = self._seen.popitem(last=False)
                if old is not None:
                    device.call("cudaGraphExecDestroy", old)

    def _set_shapes(self, profile: int, sizes: Mapping[str, int]) -> None:
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._device.stream)
            self._profile = profile
        for spec in self._entry["inputs"]:
            if not self._context.set_input_shape(spec["name"], self._buffers[spec["name"]].shape(sizes)):
                raise RequestError(
                    f"{spec['name']}: the engine refuses shape {self._buffers[spec['name']].shape(sizes)}"
                )

    def _enqueue(self, sizes: Mapping[str, int]) -> None:
        """Copies in, the engine, copies out, all on the stream."""
        device, kind = self._device, self._device.cuda.cudaMemcpyKind
        for spec in self._entry["inputs"]:
            b = self._buffers[spec["name"]]
            to_device = (b.address, b.host.ctypes.data, b.bytes(sizes), kind.cudaMemcpyHostToDevice, device.stream)
            device.call("cudaMemcpyAsync", *to_device)
        if not self._context.execute_async_v3(device.stream):
            raise EngineError(f"{self.name} failed: {' '.join(self._said[-1:])[:300] or 'no reason given'}")
        for name in self.outputs:
            b = self._buffers[name]
            to_host = (b.host.ctypes.data, b.address, b.bytes(sizes), kind.cudaMemcpyDeviceToHost, device.stream)
            device.call("cudaMemcpyAsync", *to_host)

    def _capture(self, sizes: Mapping[str, int]) -> Any:
        """The run just done as a CUDA graph; None, and no further try, where it cannot be captured."""
        device = self._device
        mode = device.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            device.call("cudaStreamBeginCapture", device.stream, mode)
            try:
                self._enqueue(sizes)
            finally:
                graph = device.call("cudaStreamEndCapture", device.stream)
            return device.call("cudaGraphInstantiate", graph, 0)
        except (BuildError, EngineError, RequestError):
            self._limit = 0
            return None


def _logger(trt: Any, said: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                said.append(message)
                del said[:-20]

    return Log()
