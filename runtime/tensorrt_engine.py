"""A half in TensorRT or TensorRT-RTX: buffers made once, nothing allocated on the device or pinned while requests run.

Written against the documented API and tested with stand-ins for the library and for CUDA. It has not run on a GPU yet.

bfloat16 values are `uint16` arrays of their bits, because numpy has no bfloat16; a state goes in as it came out. It
stays on the GPU: for a request it is copied from its own memory to the engine's, and does not cross the bus. An empty
history is run as one token of zeros that the offsets leave out, since an engine's smallest history is one token.

A CUDA graph is captured per shape, and no two histories are of one length. So rows that the offsets leave out are added
up to the next of a few sizes (`bucket`), in the dimensions for which the build has shown that such rows change nothing.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stca.bundle import ITEM_BYTES, OFFSETS, TARGETS, TOKENS, USERS
from stca.errors import BuildError, EngineError, RequestError
from stca.runtime.cuda_device import Device, DeviceArray, Owned
from stca.tensorrt_flavours import FLAVOURS, largest_sizes, load, look_into
from stca.types import Array

AnyArray = NDArray[Any] | DeviceArray
Entry = Mapping[str, Any]
_Key = tuple[int | str, ...]  # what a CUDA graph holds for: profile, sizes, inputs that cross the bus

# What a library says when it refuses a plan, and what that means; the first that fits.
_REFUSALS: Final = (
    (("plugin", "getcreator"), "needs a plugin that is not registered; load its library before the engine"),
    (("out of memory", "outofmemory", "memory allocation"), "does not fit the GPU's memory; build for smaller sizes"),
    (
        ("compute capability", "different device", "incompatible device", "platform"),
        "was built for another GPU; run `stca build` with its --sm",
    ),
    (("version", "incompatible"), "was built by another version of the library; run `stca build` again"),
    (("magic", "truncated", "corrupt", "malformed"), "is damaged; copy the bundle again"),
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


def sizes_of(entry: Entry, inputs: Mapping[str, AnyArray]) -> dict[str, int]:
    """The symbolic sizes of one run, from its inputs.

    Raises:
        RequestError: when an input is missing or has another shape or width than the engine's.
    """
    sizes: dict[str, int] = {}
    alone = " and serves one request per run" if entry["requests"] == 1 else ""
    for spec in entry["inputs"]:
        name, wanted = spec["name"], spec["shape"]
        if name not in inputs:
            raise RequestError(f"{name}: is missing; the engine needs it")
        x = inputs[name]
        if x.itemsize != ITEM_BYTES[spec["dtype"]]:
            raise RequestError(f"{name}: has dtype {x.dtype}, the engine takes {spec['dtype']}")
        matches = len(x.shape) == len(wanted)
        for n, size in zip(x.shape, wanted, strict=False):
            if n != size and (not isinstance(size, str) or n != sizes.setdefault(size, n)):
                matches = False
        if not matches:
            raise RequestError(f"{name}: has shape {list(x.shape)}, the engine takes {list(wanted)}{alone}")
    return sizes


def bucket(rows: int) -> int:
    """The size that `rows` is filled up to: a multiple of 16 and, from 64 on, one of four per power of two."""
    step = max(16, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


@dataclass(frozen=True)
class _Buffer:
    """One input or output: page-locked on the host, and on the device, as large as the profiles allow."""

    spec: Mapping[str, Any]
    host: NDArray[np.uint8]
    host_address: int
    address: int
    fixed_bytes: int
    symbols: tuple[str, ...]

    @classmethod
    def make(cls, spec: Mapping[str, Any], largest: Mapping[str, int], device: Device, owned: Owned) -> _Buffer:
        """Memory for an input or output as large as it gets."""
        symbols = tuple(n for n in spec["shape"] if isinstance(n, str))
        fixed = math.prod(n for n in spec["shape"] if not isinstance(n, str)) * ITEM_BYTES[spec["dtype"]]
        size = fixed * math.prod(largest[n] for n in symbols)
        host = device.pinned(owned, size)
        return cls(spec, host, host.ctypes.data, device.memory(owned, size), fixed, symbols)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return _shape(self.spec, sizes)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        size = self.fixed_bytes
        for symbol in self.symbols:
            size *= sizes[symbol]
        return size

    def values(self, sizes: Mapping[str, int]) -> Array:
        """The host side as an array."""
        return self.host[: self.bytes(sizes)].view(numpy_dtype(self.spec["dtype"])).reshape(self.shape(sizes))


@dataclass(frozen=True)
class _Replay:
    """A CUDA graph, and the execution context it was captured from, whose shapes are never changed again.

    A context's own state is part of what was captured, which is why NVIDIA advises one for each graph.
    """

    context: Any
    graph: Any


class TensorRTEngine:
    """One half of a bundle in TensorRT or TensorRT-RTX; see `stca.runtime.engine.Engine`.

    Threads take turns. Shapes that come again are replayed as CUDA graphs; TensorRT-RTX keeps its own. What it holds of
    the GPU is given back when it is garbage.

    Args:
        plan: the engine's file. Its digest must be in the manifest: loading a plan runs code.
        entry: what the manifest says of it.
        device: shared by the engines of one session, so that they share scratch memory.
        keep: outputs to leave on the GPU, as `DeviceArray`s.
        graphs: CUDA graphs to keep, one for each shape, those of the shapes that first come twice: a capture takes many
            times a run, so none is made in another's place. 0 captures none, and adds no rows.
        module: stands in for the library.

    Raises:
        BuildError: when the engine cannot run here; one line that says why and what to do.
    """

    def __init__(
        self,
        plan: str | os.PathLike[str],
        entry: Entry,
        device: Device,
        *,
        keep: Collection[str] = (),
        graphs: int = 64,
        module: Any = None,
    ) -> None:
        flavour = FLAVOURS[entry["flavour"]]
        trt = module if module is not None else load(flavour)
        check_fit(entry, trt.__version__, device.sm)
        self._entry, self._device, self._trt, self._graphs = entry, device, trt, graphs
        self._captures = flavour.graphs == "captured" and graphs > 0
        self._padded: Sequence[str] = entry.get("padded", ()) if graphs else ()
        self.name = f"{flavour.name} {entry['version']} (SM {entry['sm']}, {entry['precision']})"
        self.outputs = tuple(o["name"] for o in entry["outputs"])
        self._fetched = tuple(name for name in self.outputs if name not in keep)
        said: list[str] = []
        engine = trt.Runtime(_logger(trt, said)).deserialize_cuda_engine(Path(plan).read_bytes())
        if engine is None:
            raise BuildError(explain_refusal(entry, said))
        self._said, self._engine = said, engine
        self._owned = Owned(self, device.cuda)
        largest = _with_batch(largest_sizes(entry["profiles"]))
        self._buffers: dict[str, _Buffer] = {}
        for spec in (*entry["inputs"], *entry["outputs"]):
            self._buffers[spec["name"]] = _Buffer.make(spec, largest, device, self._owned)
        device.reserve(int(engine.device_memory_size_v2))
        self._scratch = device.scratch
        self._context, self._profile = self._new_context(native=flavour.graphs == "native" and graphs > 0), 0
        # Of each input its name, the bytes of an element, and its sizes, of which only the first may vary.
        self._plain = [
            (s["name"], ITEM_BYTES[s["dtype"]], next(iter(s["shape"]), None), tuple(s["shape"][1:]))
            for s in entry["inputs"]
        ]
        # Shapes seen once, newest last, and what was captured of those that came again.
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self._replays: dict[_Key, _Replay] = {}

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, Any]:
        """See `Engine.run`; inputs the engine does not have are left aside, and may be on the GPU.

        Raises:
            RequestError: when a size is beyond the engine's profiles.
            EngineError: when the run fails.
        """
        sizes = _with_batch(self._sizes(inputs))
        if sizes.get(TARGETS) == 0:
            dtypes = {o["name"]: numpy_dtype(o["dtype"]) for o in self._entry["outputs"]}
            return {o["name"]: np.zeros(_shape(o, sizes), dtypes[o["name"]]) for o in self._entry["outputs"]}
        run_sizes = {d: 1 if d == TOKENS and n == 0 else n for d, n in sizes.items()}
        profile = choose_profile(self._entry, run_sizes)
        for dim in self._padded:
            run_sizes[dim] = min(bucket(run_sizes[dim]), self._entry["profiles"][profile][dim][2])
        try:
            with self._device.lock:
                self._device.collect()
                staged = self._stage(inputs, run_sizes)
                self._execute(profile, run_sizes, staged)
                return {name: self._result(self._buffers[name], name, sizes, run_sizes) for name in self.outputs}
        except BuildError as e:  # CUDA failed, and not while an engine was made
            raise EngineError(f"{self.name} failed: {e}") from e

    def inspect(self) -> dict[str, Any]:
        """What the library tells of the engine: `layers`, after fusion, and `device_memory` in bytes."""
        return look_into(self._trt, self._engine)

    def _sizes(self, inputs: Mapping[str, AnyArray]) -> dict[str, int]:
        """As `sizes_of`, which is asked where an input is not plainly right: this is a tenth of what it takes."""
        sizes: dict[str, int] = {}
        for name, itemsize, symbol, rest in self._plain:
            x = inputs.get(name)
            if x is None or x.itemsize != itemsize or x.shape[1:] != rest or len(x.shape) <= len(rest):
                return sizes_of(self._entry, inputs)
            rows = x.shape[0]
            if rows != (sizes.setdefault(symbol, rows) if isinstance(symbol, str) else symbol):
                return sizes_of(self._entry, inputs)
        return sizes

    def _new_context(self, *, native: bool = False) -> Any:
        """An execution context on this engine's buffers and the shared scratch memory."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if native:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise BuildError(explain_refusal(self._entry, [*self._said, "out of memory"]))
        for name, buffer in self._buffers.items():
            context.set_tensor_address(name, buffer.address)
        context.set_device_memory(self._device.scratch, self._device.scratch_bytes)
        return context

    def _stage(self, inputs: Mapping[str, AnyArray], sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Put inputs where the engine finds them; rows that are added are zeros.

        Returns:
            The names of those that are in page-locked memory now, and still have to cross the bus.
        """
        device, staged = self._device, []
        for spec in self._entry["inputs"]:
            name, buffer = spec["name"], self._buffers[spec["name"]]
            x, size = inputs[name], buffer.bytes(sizes)
            given = x.nbytes
            if isinstance(x, DeviceArray):
                if given:
                    device.copy(buffer.address, x.address, given)
                if given < size:
                    device.call("cudaMemsetAsync", buffer.address + given, 0, size - given, device.stream)
            else:
                buffer.host[:given] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
                if given < size:
                    buffer.host[given:size] = 0
                staged.append(name)
        return tuple(staged)

    def _result(self, buffer: _Buffer, name: str, sizes: Mapping[str, int], run_sizes: Mapping[str, int]) -> AnyArray:
        """An output of the run just done, in memory of its own, without the rows that were added."""
        if name in self._fetched:
            return buffer.values(run_sizes)[: _rows(buffer.spec, sizes)].copy()
        result = self._device.array(buffer.shape(sizes), numpy_dtype(buffer.spec["dtype"]))
        if result.nbytes:
            self._device.copy(result.address, buffer.address, result.nbytes)
        return result

    def _execute(self, profile: int, sizes: Mapping[str, int], staged: tuple[str, ...]) -> None:
        device, key = self._device, _key(profile, sizes, staged)
        if self._scratch != device.scratch:  # another engine made it grow: graphs hold the old address
            self._scratch = device.scratch
            self._context.set_device_memory(device.scratch, device.scratch_bytes)
            while self._replays:
                _, old = self._replays.popitem()
                self._owned.drop("cudaGraphExecDestroy", old.graph)  # before its context
        if replay := self._replays.get(key):
            device.call("cudaGraphLaunch", replay.graph, device.stream)
            device.call("cudaStreamSynchronize", device.stream)
            return
        if profile != self._profile:
            self._use_profile(self._context, profile)
            self._profile = profile
        self._set_shapes(self._context, sizes)
        self._enqueue(self._context, sizes, staged)
        device.call("cudaStreamSynchronize", device.stream)
        if not self._captures or len(self._replays) == self._graphs:
            return
        if key in self._seen:
            del self._seen[key]
            self._capture(key, profile, sizes, staged)
        else:
            self._seen[key] = None
            if len(self._seen) > 4 * self._graphs:
                self._seen.popitem(last=False)

    def _use_profile(self, context: Any, profile: int) -> None:
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise EngineError(f"{self.name} does not take profile {profile}: {' '.join(self._said[-1:])[:300]}")

    def _set_shapes(self, context: Any, sizes: Mapping[str, int]) -> None:
        for spec in self._entry["inputs"]:
            if not context.set_input_shape(spec["name"], shape := self._buffers[spec["name"]].shape(sizes)):
                raise RequestError(f"{spec['name']}: the engine refuses shape {shape}")

    def _enqueue(self, context: Any, sizes: Mapping[str, int], staged: Sequence[str]) -> None:
        """Copies over the bus, the engine, copies back, all on the stream."""
        device, kind = self._device, self._device.cuda.cudaMemcpyKind
        for name in staged:
            b = self._buffers[name]
            to_device = (b.address, b.host_address, b.bytes(sizes), kind.cudaMemcpyHostToDevice, device.stream)
            device.call("cudaMemcpyAsync", *to_device)
        if not context.execute_async_v3(device.stream):
            raise EngineError(f"{self.name} failed: {' '.join(self._said[-1:])[:300] or 'no reason given'}")
        for name in self._fetched:
            b = self._buffers[name]
            to_host = (b.host_address, b.address, b.bytes(sizes), kind.cudaMemcpyDeviceToHost, device.stream)
            device.call("cudaMemcpyAsync", *to_host)

    def _capture(self, key: _Key, profile: int, sizes: Mapping[str, int], staged: Sequence[str]) -> None:
        """Keep the run just done as a CUDA graph; where that cannot be had, do not try again."""
        device = self._device
        mode = device.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            context = self._new_context()
            if profile:
                self._use_profile(context, profile)
            self._set_shapes(context, sizes)
            self._enqueue(context, sizes, staged)  # what a context does on its first run only must not be captured
            device.call("cudaStreamSynchronize", device.stream)
            device.call("cudaStreamBeginCapture", device.stream, mode)
            try:
                self._enqueue(context, sizes, staged)
            finally:
                captured = device.call("cudaStreamEndCapture", device.stream)
            try:
                graph = device.call("cudaGraphInstantiate", captured, 0)
            finally:
                device.call("cudaGraphDestroy", captured)
        except (BuildError, EngineError, RequestError) as e:
            self._captures = False
            self.name += f", without CUDA graphs ({e})"
            return
        self._replays[key] = _Replay(context, self._owned.add("cudaGraphExecDestroy", graph))


def _with_batch(sizes: dict[str, int]) -> dict[str, int]:
    """With the number of requests, which an output may have though only offsets tell it."""
    if OFFSETS in sizes:
        sizes.setdefault(USERS, sizes[OFFSETS] - 1)
    return sizes


def _key(profile: int, sizes: Mapping[str, int], staged: Sequence[str]) -> _Key:
    return (profile, *sizes.values(), *staged)


def _rows(spec: Mapping[str, Any], sizes: Mapping[str, int]) -> int | None:
    """Rows of an output that are the request's, where its first size varies."""
    first = next(iter(spec["shape"]), None)
    return sizes[first] if isinstance(first, str) else None


def _shape(spec: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[n] if isinstance(n, str) else n for n in spec["shape"])


def _logger(trt: Any, said: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                said.append(message)
                del said[:-20]

    return Log()
