"""Run an artifact on a GPU with exactly the arguments that TensorRT would pass: a proof of the PTX without TensorRT.

Needs `cuda-bindings` and a driver, both looked for on first use. Tensors are device addresses, so any framework's will
do (`tensor.data_ptr()`); the launch goes into the primary context, which is also torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from stca.plugins.aot import ALIGNMENT, Artifact, compile_attend, compile_combine
from stca.plugins.driver import check, driver
from stca.plugins.tiling import Plan, Shape

if TYPE_CHECKING:
    from stca.plugins.launch import Launch  # which needs torch

# A block gets more than this only after the function's limit is raised; nobody has tried whether TensorRT raises it.
DEFAULT_SHARED_LIMIT: Final = 48 * 1024
_TYPES: Final = {"u64": ctypes.c_void_p, "u32": ctypes.c_int}


def arguments(
    artifact: Artifact, inputs: Sequence[int], values: Sequence[int], outputs: Sequence[int]
) -> tuple[tuple[int, ...], tuple[type[Any], ...]]:
    """The kernel's arguments in TensorRT's order (input tensors, int32 values, output tensors) and their C types.

    Args:
        artifact: says how many and which parameters the kernel has.
        inputs: device addresses.
        values: int32 values.
        outputs: device addresses.

    Raises:
        ValueError: when they are not the artifact's parameters, an address is not aligned, or a value is not an int32.
    """
    given = ("u64",) * len(inputs) + ("u32",) * len(values) + ("u64",) * len(outputs)
    if given != artifact.parameters:
        raise ValueError(f"{artifact.kernel} takes ({', '.join(artifact.parameters)}); given were ({', '.join(given)})")
    for address in (*inputs, *outputs):
        if address % ALIGNMENT:
            raise ValueError(f"{artifact.kernel}: address {address:#x} is not a multiple of {ALIGNMENT}")
    for value in values:
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"{artifact.kernel}: {value} is not an int32")
    return (*inputs, *values, *outputs), tuple(_TYPES[kind] for kind in given)


class LoadedKernel:
    """An artifact, compiled by the driver for the GPU at hand, ready to launch."""

    def __init__(self, artifact: Artifact, device: int = 0) -> None:
        """Raises BuildError when there is no GPU, or the driver refuses the PTX as one for another architecture."""
        self.artifact = artifact
        self._driver = driver()
        context = check(self._driver.cuDevicePrimaryCtxRetain(check(self._driver.cuDeviceGet(device))))
        check(self._driver.cuCtxSetCurrent(context))
        self._module = check(self._driver.cuModuleLoadData(artifact.ptx.encode() + b"\0"))
        self._function = check(self._driver.cuModuleGetFunction(self._module, artifact.kernel.encode()))
        if artifact.shared > DEFAULT_SHARED_LIMIT:
            limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(self._driver.cuFuncSetAttribute(self._function, limit, artifact.shared))

    def launch(
        self,
        grid: tuple[int, int, int],
        inputs: Sequence[int],
        values: Sequence[int],
        outputs: Sequence[int],
        stream: int = 0,
    ) -> None:
        """Enqueue one launch; it does not wait.

        Args:
            grid: blocks in each dimension.
            inputs: device addresses of the input tensors.
            values: int32 values.
            outputs: device addresses of the output tensors.
            stream: a CUDA stream's handle, 0 for the default one.

        Raises:
            ValueError: as `arguments` does.
            BuildError: with the driver's error.
        """
        packed = arguments(self.artifact, inputs, values, outputs)
        block = (self.artifact.threads, 1, 1)
        check(self._driver.cuLaunchKernel(self._function, *grid, *block, self.artifact.shared, stream, packed, 0))


def load(shape: Shape, plan: Plan, sm: int, scale: float, device: int = 0) -> list[LoadedKernel]:
    """The kernels that an engine for `sm` would hold for a plan: one, or with a split history two.

    Raises:
        BuildError: as `compile_attend` and `LoadedKernel` do.
    """
    split = plan.parts > 1
    artifacts = [compile_attend(shape, plan.tile, sm, scale, split)]
    if split:
        artifacts.append(compile_combine(shape.value_depth, shape.dtype, sm))
    return [LoadedKernel(artifact, device) for artifact in artifacts]


def run(steps: Sequence[Launch], kernels: Sequence[LoadedKernel], stream: int = 0) -> None:
    """Enqueue the launches of `stca.plugins.launch.launches`, each with its own artifact, instead of Triton's.

    Raises:
        ValueError: as `arguments` does.
        BuildError: with the driver's error.
    """
    for step, kernel in zip(steps, kernels, strict=True):
        given = [x for x in step.arguments if x is not None]
        kinds = [isinstance(x, int) for x in given]
        first, last = kinds.index(True), len(kinds) - kinds[::-1].index(True)
        numbers = [x if isinstance(x, int) else x.data_ptr() for x in given]
        kernel.launch(step.grid, numbers[:first], numbers[first:last], numbers[last:], stream)
