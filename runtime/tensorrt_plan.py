"""What a manifest says of a TensorRT plan, and what follows from it: whether it may be loaded, sizes, profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stca.contract import check_engine
from stca.errors import BuildError, BundleError, RequestError, said
from stca.manifest import EngineEntry, EngineTensor
from stca.runtime.cuda_device import DeviceArray
from stca.specs import ITEM_BYTES, GraphSpec, TensorSpec

AnyArray = NDArray[Any] | DeviceArray

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


def check_fit(entry: EngineEntry, version: str, sm: int) -> None:
    """Whether an engine may be loaded here at all.

    Raises:
        BuildError: for another version of the library, or another GPU.
    """
    what, again = entry.file, f"run `stca build` again with --engine {entry.flavour}"
    if entry.version != version:
        made = f"{entry.flavour} {entry.version}"
        raise BuildError(f"{what} was built with {made}, here is {version}; install that one, or {again}")
    if entry.sm != sm:
        raise BuildError(f"{what} was built for SM {entry.sm}, this GPU is SM {sm}; {again} --sm {sm}")


# The library's words for types.
_TYPES: Final = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def check_plan(trt: Any, engine: Any, entry: EngineEntry) -> None:
    """Hold what the library says of a loaded plan against what the manifest does: buffers are made by that.

    Raises:
        BuildError: naming the tensor.
    """
    found: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        kind = engine.get_tensor_dtype(name).name
        shape = tuple("" if n < 0 else int(n) for n in engine.get_tensor_shape(name))
        spec = TensorSpec(name, _TYPES.get(kind, kind.lower()), shape)
        found[engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT].append(spec)
    promised = GraphSpec(entry.file, tuple(specs_of(entry.inputs)), tuple(specs_of(entry.outputs)))
    remedy = f"run `stca build --engine {entry.flavour}` again"
    try:
        check_engine(entry.file, promised, found[True], found[False], remedy=remedy)
    except BundleError as e:
        raise BuildError(str(e)) from e
    if extra := {s.name for s in found[False]} - {s.name for s in promised.outputs}:
        raise BuildError(f"{entry.file}: gives {min(extra)!r}, of which the manifest says nothing; {remedy}")


def specs_of(tensors: Sequence[EngineTensor]) -> list[TensorSpec]:
    """An entry's inputs or outputs as a graph's."""
    return [TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in tensors]


def explain_refusal(entry: EngineEntry, log: Sequence[str]) -> str:
    """One line for a plan that the library would not load, from what it logged."""
    text = " ".join(log).lower()
    for signs, meaning in _REFUSALS:
        if any(sign in text for sign in signs):
            return f"{entry.file} {meaning}"
    return f"{entry.file} cannot be loaded: {said(' '.join(log)) or 'the library gives no reason'}"


def choose_profile(entry: EngineEntry, sizes: Mapping[str, int]) -> int:
    """The tightest optimization profile that admits these sizes.

    Raises:
        RequestError: naming the dimension, its size and the limit.
    """
    profiles = entry.profiles
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
                f"{dim} is {size}, {entry.file} was built for at most {most}; send less, or build for more"
            )
    raise RequestError(f"no profile of {entry.file} admits {dict(sizes)}; build with a profile for it")


def sizes_of(entry: EngineEntry, inputs: Mapping[str, AnyArray]) -> dict[str, int]:
    """The symbolic sizes of one run, from its inputs.

    Raises:
        RequestError: when an input is missing or has another shape or width than the engine's.
    """
    sizes: dict[str, int] = {}
    alone = " and serves one request per run" if entry.requests == 1 else ""
    for spec in entry.inputs:
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
