"""The NVIDIA driver by its Python bindings: whether it is there, and which GPU. Loads no kernel and no compiler."""

from __future__ import annotations

from typing import Any

from stca.errors import BuildError


def device_sm(device: int = 0) -> int:
    """Compute capability of a GPU of this machine, 90 for 9.0.

    Raises:
        BuildError: when `cuda-bindings`, the driver or the GPU is missing.
    """
    api = driver()
    handle = check(api.cuDeviceGet(device))
    attribute = api.CUdevice_attribute
    major = check(api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
    minor = check(api.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
    return int(major) * 10 + int(minor)


def driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BuildError("launching a kernel needs the driver's bindings: pip install cuda-bindings") from error
    try:
        check(driver.cuInit(0))
    except RuntimeError as error:  # the library itself is not there
        raise BuildError(f"no NVIDIA driver on this machine ({error})") from error
    return driver


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call. Raises BuildError with the error's name."""
    error, *values = result
    if int(error) != 0:
        raise BuildError(f"the NVIDIA driver answered {error.name}")
    return values[0] if values else None
