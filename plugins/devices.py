"""What the cost model knows of GPUs, and which of them have kernels built ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from stca.plugins.spec import QUALIFIED_NAME

# SMs whose artifacts are built ahead of time; just-in-time compilation serves every later one too.
ARTIFACT_SMS: Final = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Device:
    """Rates of a GPU. Datasheet figures are good enough to rank plans; only ratios matter.

    Attributes:
        sm: compute capability, 90 for 9.0. multiprocessors: how many.
        bandwidth: device memory, byte/s. cache_bandwidth: second-level cache, byte/s.
        matrix: dense 16-bit operations/s. exponentials: per second.
        shared: bytes of shared memory per multiprocessor; a block gets at most 1 KiB less.
    """

    sm: int
    multiprocessors: int
    bandwidth: float
    cache_bandwidth: float
    matrix: float
    exponentials: float
    shared: int

    @property
    def clock(self) -> float:
        """Cycles per second: 16 exponentials each, and 128 bytes of shared memory, on every multiprocessor."""
        return self.exponentials / (16 * self.multiprocessors)

    @property
    def shared_bandwidth(self) -> float:
        """Of all shared memories together, byte/s."""
        return 128 * self.multiprocessors * self.clock

    @property
    def shared_limit(self) -> int:
        """Most shared memory of one block, in bytes."""
        return self.shared - 1024


_DEVICES: Final = (
    Device(80, 108, 2.0e12, 4.5e12, 312e12, 108 * 16 * 1.41e9, 164 * 1024),
    Device(86, 84, 0.94e12, 2.5e12, 142e12, 84 * 16 * 1.7e9, 100 * 1024),
    Device(89, 142, 0.86e12, 4.0e12, 362e12, 142 * 16 * 2.5e9, 100 * 1024),
    Device(90, 132, 3.35e12, 5.5e12, 989e12, 132 * 16 * 1.75e9, 228 * 1024),
    Device(100, 148, 8.0e12, 10.0e12, 2250e12, 148 * 16 * 1.9e9, 228 * 1024),
    Device(120, 170, 1.79e12, 7.0e12, 209e12, 170 * 16 * 2.4e9, 100 * 1024),
)


def device_for(sm: int) -> Device:
    """The rates of the newest known GPU that is not newer than `sm`.

    Raises:
        ValueError: for an SM before 80, which has no asynchronous copies and no bfloat16.
    """
    known = [device for device in _DEVICES if device.sm <= sm]
    if not known:
        raise ValueError(
            f"{QUALIFIED_NAME}: SM {sm} is not supported; the kernels need SM 80 or later and are built for "
            f"{', '.join(map(str, ARTIFACT_SMS))}"
        )
    return known[-1]


def scaled(device: Device, multiprocessors: int) -> Device:
    """The same GPU with another number of multiprocessors, and rates in proportion; bandwidth stays."""
    share = multiprocessors / device.multiprocessors
    return replace(
        device,
        multiprocessors=multiprocessors,
        cache_bandwidth=device.cache_bandwidth * share,
        matrix=device.matrix * share,
        exponentials=device.exponentials * share,
    )
