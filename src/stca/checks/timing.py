"""Seconds of calls, alone or in turn, and the machine that they were measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from stca.arrays import Array


def measure(run: Callable[[], object], seconds: float, *, least: int = 5, most: int = 200) -> Array:
    """Seconds of each call of `run`, warmed up once: at least `least` calls, more until `seconds` have passed."""
    run()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return np.array(times)


def measure_in_turn(
    runs: Mapping[str, Callable[[], object]], seconds: float, *, least: int = 5, most: int = 200, warm: int = 1
) -> dict[str, Array]:
    """`measure` for several runs, one call of each after the other: what slows the machine down meanwhile slows all.

    Args:
        runs: what to call, by name; each after the one before it.
        seconds: for each of them, on average.
        least, most: calls of each.
        warm: calls of each before them.

    Returns:
        Seconds of each call, by name.
    """
    for _ in range(warm):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, calls = time.perf_counter(), 0
    while calls < least or (time.perf_counter() - began < seconds * len(runs) and calls < most):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        calls += 1
    return {name: np.array(t) for name, t in times.items()}


def machine(threads: int | None) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "threads": threads or cores, "system": platform.system()}
