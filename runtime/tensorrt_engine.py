"""A half in TensorRT or TensorRT-RTX: buffers made once, nothing allocated on the device or pinned while requests run.

Written against the documented API and tested with stand-ins for the library and for CUDA. It has not run on a GPU yet.

bfloat16 values are `uint16` arrays of their bits, because numpy has no bfloat16; a state goes in as it came out. It
stays on the GPU: for a request it is copied from its own memory to the engine's, and does not cross the bus. States of
more than `MOST_COPIED` bytes are read where they lie; such a run is no CUDA graph, as that reads one place. An empty
history is run as one token of zeros that the offsets leave out, since an engine's smallest history is one token.

A CUDA graph is captured per shape, and no two histories are of one length. So rows that the offsets leave out are added
up to the next of a few sizes (`bucket`), in the dimensions for which the build has shown that such rows change nothing.
"""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stca.arrays import Array
from stca.errors import BuildError, EngineError, RequestError
from stca.manifest import EngineEntry, EngineTensor
from stca.runtime.cuda_device import Device, DeviceArray, Owned
from stca.runtime.tensorrt_plan import (
    AnyArray,
    bucket,
    check_fit,
    check_plan,
    choose_profile,
    explain_refusal,
    numpy_dtype,
    sizes_of,
    specs_of,
)
from stca.specs import ITEM_BYTES, OFFSETS, TARGETS, TOKENS, USERS, TensorSpec
from stca.tensorrt_flavours import FLAVOURS, largest_sizes, load, look_into, runtime_for

_Key = tuple[int | str, ...]  # what a CUDA graph holds for: profile, sizes, inputs that cross the bus

# A longer copy costs more than the launches that a graph would spare; the C++ runtime draws the same line.
MOST_COPIED: Final = 64 << 20
# Each graph's context takes memory of its own, how much the library does not say: this share of the GPU stays free.
LEFT_FREE: Final = 1 / 16
# What TensorRT asks of an address that it reads or writes.
ALIGNMENT: Final = 256


class _Buffer:
    """One input or output, as large as the profiles allow: on the device and, once it crosses the bus, page-locked too.

    Kept states never cross it, and at production size a page-locked copy of one is 164 MB.
    """

    def __init__(self, spec: EngineTensor, largest: Mapping[str, int], device: Device, owned: Owned) -> None:
        self.spec, self._device, self._owned = spec, device, owned
        self.symbols = tuple(n for n in spec["shape"] if isinstance(n, str))
        self.fixed_bytes = math.prod(n for n in spec["shape"] if not isinstance(n, str)) * ITEM_BYTES[spec["dtype"]]
        self._most = self.fixed_bytes * math.prod(largest[n] for n in self.symbols)
        self.address = device.memory(owned, self._most)
        if self.address % ALIGNMENT:
            raise BuildError(f"{spec['name']}: CUDA gave memory at {self.address:#x}, TensorRT wants {ALIGNMENT} bytes")

    @functools.cached_property
    def host(self) -> NDArray[np.uint8]:
        """Page-locked memory, made when it is first asked for."""
        return self._device.pinned(self._owned, self._most)

    @functools.cached_property
    def host_address(self) -> int:
        return self.host.ctypes.data

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
        keep: outputs to leave on the GPU, as `DeviceArray`s, and inputs that were left there.
        graphs: CUDA graphs to keep, one for each shape, those of the shapes that first come twice: a capture takes many
            times a run, so none is made in another's place, nor with a sixteenth or less of the GPU's memory free. 0
            captures none, and adds no rows.
        module: stands in for the library.

    Raises:
        BuildError: when the engine cannot run here; one line that says why and what to do.
    """

    may_leave_out = True

    def __init__(
        self,
        plan: str | os.PathLike[str],
        entry: EngineEntry,
        device: Device,
        *,
        keep: Collection[str] = (),
        graphs: int = 64,
        module: Any = None,
    ) -> None:
        flavour = FLAVOURS[entry.flavour]
        trt = module if module is not None else load(flavour)
        check_fit(entry, trt.__version__, device.sm)
        self._entry, self._device, self._trt, self._graphs = entry, device, trt, graphs
        self._captures = flavour.graphs == "captured" and graphs > 0
        self._padded: Sequence[str] = entry.padded if graphs else ()
        self.name = f"{flavour.name} {entry.version} (SM {entry.sm}, {entry.precision})"
        self.outputs = tuple(o["name"] for o in entry.outputs)
        self._fetched = tuple(name for name in self.outputs if name not in keep)
        with device.use():
            self._load(plan, keep)

    def _load(self, plan: str | os.PathLike[str], keep: Collection[str]) -> None:
        trt, entry, device, flavour = self._trt, self._entry, self._device, FLAVOURS[self._entry.flavour]
        said: list[str] = []
        runtime = runtime_for(trt, _logger(trt, said), entry.lowering)
        engine = runtime.deserialize_cuda_engine(Path(plan).read_bytes())
        if engine is None:
            raise BuildError(explain_refusal(entry, said))
        self._said, self._engine = said, engine
        check_plan(trt, engine, entry)
        self._owned = Owned(self, device.cuda)
        largest = _with_batch(largest_sizes(entry.profiles))
        self._buffers: dict[str, _Buffer] = {}
        for spec in (*entry.inputs, *entry.outputs):
            buffer = self._buffers[spec["name"]] = _Buffer(spec, largest, device, self._owned)
            if spec["name"] not in keep:
                buffer.host  # noqa: B018, while the engine is loaded and not while a request waits
        device.reserve(int(engine.device_memory_size_v2))
        self._scratch = device.scratch
        self._context, self._profile = self._new_context(native=flavour.graphs == "native" and self._graphs > 0), 0
        # Of each input its name, the bytes of an element, and its sizes, of which only the first may vary.
        self._plain = [
            (s["name"], ITEM_BYTES[s["dtype"]], next(iter(s["shape"]), None), tuple(s["shape"][1:]))
            for s in entry.inputs
        ]
        # Shapes seen once, newest last, and what was captured of those that came again.
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        self._replays: dict[_Key, _Replay] = {}

    def signature(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """See `Engine.signature`; of the entry, which the library's engine was held against."""
        return specs_of(self._entry.inputs), specs_of(self._entry.outputs)

    def run(self, inputs: Mapping[str, AnyArray]) -> dict[str, Any]:
        """See `Engine.run`; inputs the engine does not have are left aside, and may be on the GPU.

        Raises:
            RequestError: when a size is beyond the engine's profiles.
            EngineError: when the run fails.
        """
        sizes = _with_batch(self._sizes(inputs))
        if sizes.get(TARGETS) == 0:
            dtypes = {o["name"]: numpy_dtype(o["dtype"]) for o in self._entry.outputs}
            return {o["name"]: np.zeros(_shape(o, sizes), dtypes[o["name"]]) for o in self._entry.outputs}
        run_sizes = {d: 1 if d == TOKENS and n == 0 else n for d, n in sizes.items()}
        profile = choose_profile(self._entry, run_sizes)
        in_place = self._in_place(inputs)
        for dim in () if in_place else self._padded:
            run_sizes[dim] = min(bucket(run_sizes[dim]), self._entry.profiles[profile][dim][2])
        try:
            with self._device.use():
                self._device.collect()
                staged = self._stage(inputs, run_sizes, in_place)
                self._execute(profile, run_sizes, staged, in_place)
                return {name: self._result(self._buffers[name], name, sizes, run_sizes) for name in self.outputs}
        except BuildError as e:  # CUDA failed, and not while an engine was made
            raise EngineError(f"{self.name} failed: {e}") from e

    def _in_place(self, inputs: Mapping[str, AnyArray]) -> dict[str, int]:
        """Addresses of states that are read where they lie: all, where copying them costs more than a graph spares."""
        states = {n: x for n in self._buffers if isinstance(x := inputs.get(n), DeviceArray) and x.nbytes}
        if sum(x.nbytes for x in states.values()) <= MOST_COPIED:
            return {}
        return {name: x.address for name, x in states.items() if x.address % ALIGNMENT == 0}

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

    def _stage(
        self, inputs: Mapping[str, AnyArray], sizes: Mapping[str, int], in_place: Collection[str]
    ) -> tuple[str, ...]:
        """Put inputs where the engine finds them, but for those it reads in place; rows that are added are zeros.

        Returns:
            The names of those that are in page-locked memory now, and still have to cross the bus.
        """
        device, staged = self._device, []
        for spec in self._entry.inputs:
            name, buffer = spec["name"], self._buffers[spec["name"]]
            x, size = inputs[name], buffer.bytes(sizes)
            given = x.nbytes
            if name in in_place:
                continue
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

    def _execute(
        self, profile: int, sizes: Mapping[str, int], staged: tuple[str, ...], in_place: Mapping[str, int]
    ) -> None:
        device, key = self._device, _key(profile, sizes, staged)
        if self._scratch != device.scratch:  # another engine made it grow: graphs hold the old address
            self._scratch = device.scratch
            self._context.set_device_memory(device.scratch, device.scratch_bytes)
            while self._replays:
                _, old = self._replays.popitem()
                self._owned.drop("cudaGraphExecDestroy", old.graph)  # before its context
        if not in_place and (replay := self._replays.get(key)):
            device.call("cudaGraphLaunch", replay.graph, device.stream)
            device.call("cudaStreamSynchronize", device.stream)
            return
        if profile != self._profile:
            self._use_profile(self._context, profile)
            self._profile = profile
        self._set_shapes(self._context, sizes)
        for name, address in in_place.items():
            self._context.set_tensor_address(name, address)
        try:
            self._enqueue(self._context, sizes, staged, device.stream)
            device.call("cudaStreamSynchronize", device.stream)
        finally:
            for name in in_place:
                self._context.set_tensor_address(name, self._buffers[name].address)
        if in_place or not self._captures or len(self._replays) == self._graphs:
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
        for spec in self._entry.inputs:
            if not context.set_input_shape(spec["name"], shape := self._buffers[spec["name"]].shape(sizes)):
                raise RequestError(f"{spec['name']}: the engine refuses shape {shape}")

    def _enqueue(self, context: Any, sizes: Mapping[str, int], staged: Sequence[str], stream: int) -> None:
        """Copies over the bus, the engine, copies back, all on the stream."""
        device, kind = self._device, self._device.cuda.cudaMemcpyKind
        for name in staged:
            b = self._buffers[name]
            to_device = (b.address, b.host_address, b.bytes(sizes), kind.cudaMemcpyHostToDevice, stream)
            device.call("cudaMemcpyAsync", *to_device)
        if not context.execute_async_v3(stream):
            raise EngineError(f"{self.name} failed: {' '.join(self._said[-1:])[:300] or 'no reason given'}")
        for name in self._fetched:
            b = self._buffers[name]
            to_host = (b.host_address, b.address, b.bytes(sizes), kind.cudaMemcpyDeviceToHost, stream)
            device.call("cudaMemcpyAsync", *to_host)

    def _capture(self, key: _Key, profile: int, sizes: Mapping[str, int], staged: Sequence[str]) -> None:
        """Keep the run just done as a CUDA graph, if there is memory; where that cannot be had, do not try again."""
        device = self._device
        try:
            free, total = device.call("cudaMemGetInfo")
            if free <= total * LEFT_FREE:
                return
            context = self._new_context()
            if profile:
                self._use_profile(context, profile)
            self._set_shapes(context, sizes)
            # What a context does on its first run only must not be captured.
            self._enqueue(context, sizes, staged, device.stream)
            device.call("cudaStreamSynchronize", device.stream)
            graph = device.record(lambda stream: self._enqueue(context, sizes, staged, stream))
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


def _rows(spec: EngineTensor, sizes: Mapping[str, int]) -> int | None:
    """Rows of an output that are the request's, where its first size varies."""
    first = next(iter(spec["shape"]), None)
    return sizes[first] if isinstance(first, str) else None


def _shape(spec: EngineTensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
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
