"""What a deployment of a bundle should look like on a machine: users that fit, latency, throughput, what helps most.

Predicted from counts and rates (`stca.checks.forecast`): on a GPU from datasheet rates, nothing of it measured there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from stca import probe
from stca.bundle import Bundle
from stca.calibration.quantized_state import kept_as, quantizable
from stca.checks.forecast import Item, Rates, forecast
from stca.errors import UsageError
from stca.plugins import tiling
from stca.plugins.devices import Device, device_for
from stca.runtime.state import StateKey, UserState, cost_of
from stca.specs import ITEM_BYTES, OFFSETS, TOKENS, StateSpec

# What a serving process needs besides weights and states, as part of the memory: buffers, graphs, the library itself.
_RESERVED: Final = 0.1
# What a dense product reaches of a datasheet's rate.
_REACHED: Final = 0.7
# What the float32 tensors of a state can be kept in; 8 bits need `stca calibrate`.
FORMATS: Final = ("float32", "bfloat16", "int8")


# Of anything in a workload: more are a mistake, and their products leave every type.
_MOST: Final = 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU one can buy: the rates of the cost model, and its memory in bytes."""

    device: Device
    memory: int


_H100: Final = device_for(90)
GPUS: Final[Mapping[str, Gpu]] = {
    "a100": Gpu(device_for(80), 80 * 10**9),
    "l40s": Gpu(device_for(89), 48 * 10**9),
    "h100": Gpu(_H100, 80 * 10**9),
    "h200": Gpu(dataclasses.replace(_H100, bandwidth=4.8e12), 141 * 10**9),
    "b200": Gpu(device_for(100), 180 * 10**9),
    "rtx5090": Gpu(device_for(120), 32 * 10**9),
}


@dataclass(frozen=True)
class GpuRates:
    """A GPU as a machine of `forecast`, in bfloat16: each product and attention a launch, the rest fused into them."""

    device: Device

    def least(self, stage: str) -> float:
        """See `Rates.least`: the host's share is not in it."""
        return 0.0

    def seconds(self, item: Item) -> float:
        """See `Rates.seconds`."""
        if item.shape is not None and item.sizes is not None:
            with contextlib.suppress(ValueError):  # no tile fits: it runs as the products that it is
                return tiling.choose(dataclasses.replace(item.shape, dtype="bfloat16"), item.sizes, self.device).seconds
        moved = (item.bytes - item.between) / 2 / self.device.bandwidth
        if item.kind not in ("product", "attention"):
            return moved
        weight = 2 * math.prod(item.weight or (0,)) / self.device.bandwidth
        return tiling.LAUNCH + max(item.operations / (_REACHED * self.device.matrix), moved + weight)


@dataclass(frozen=True)
class Demand:
    """Who asks for what.

    Attributes:
        users: how many there are.
        history, targets: of a request.
        zipf: how much more often the frequent ones return, as in `stca load`; 0 is all alike.
        rate: requests a second to serve; 0 for none in particular.
    """

    users: int = 1_000_000
    history: int = 10_000
    targets: int = 300
    zipf: float = 1.0
    rate: float = 0.0

    @classmethod
    def parse(cls, text: str, bundle: Bundle | None = None) -> Demand:
        """From `users=1000000,history=10000,targets=300`; what is left out has its default.

        Sizes that a bundle's model has fixed are those of its requests, whatever is asked; a history that is left out
        is no longer than the bundle serves.

        Raises:
            UsageError: naming what is not known or not a number above 0.
        """
        kinds = {"users": int, "history": int, "targets": int, "zipf": float, "rate": float}
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                values[name] = kinds[name](value)
                sound = (name not in ("zipf", "rate")) <= values[name] <= _MOST  # which NaN is not
            except KeyError:
                raise UsageError(f"--workload {part!r}: expected NAME=N with a NAME of {', '.join(kinds)}") from None
            except ValueError:
                sound = False
            if not sound:
                number = "a whole number from 1" if kinds[name] is int else "a number from 0"
                number += f" to {_MOST:,}"
                raise UsageError(f"--workload {part!r}: {name} is {number}, as in {name}={getattr(cls, name)}")
        asked = cls(**values)
        if bundle is None:
            return asked
        graph, most = bundle.manifest.graphs["request"], bundle.manifest.max_history
        history = min(asked.history, most) if most is not None and "history" not in values else asked.history
        sizes = probe.history_of(graph.inputs, history), probe.targets_of(graph, asked.targets)
        return dataclasses.replace(asked, history=sizes[0], targets=sizes[1])

    def hits(self, kept: int) -> float:
        """The share of requests of users whose state is kept, where those are the most frequent."""
        return min(1.0, _harmonic(min(kept, self.users), self.zipf) / _harmonic(self.users, self.zipf))


def _harmonic(n: int, power: float) -> float:
    """Sum of `k ** -power` for k from 1 to n, its tail as an integral."""
    exact = min(n, 1000)
    head = float(sum(k**-power for k in range(1, exact + 1)))
    if n == exact:
        return head
    a, b = exact + 0.5, n + 0.5
    return head + float(math.log(b / a) if power == 1 else (b ** (1 - power) - a ** (1 - power)) / (1 - power))


@dataclass(frozen=True)
class Plan:
    """One way to serve.

    Attributes:
        state_format: of a kept value. state_bytes: of a user's tensors. user_bytes: what a session counts of a
            user, with key and objects.
        weights_bytes: of the bundle's files, and of its tables where they lie in the same memory.
        users: whose states fit. hit_share: of the requests.
        hit_ms, miss_ms: of one request, computation alone. per_second: requests, one after the other.
    """

    state_format: str
    state_bytes: int
    user_bytes: int
    weights_bytes: int
    users: int
    hit_share: float
    hit_ms: float
    miss_ms: float
    per_second: float


def plan(bundle: Bundle, rates: Rates, demand: Demand, memory: int, state_format: str) -> Plan:
    """What one machine does.

    Args:
        bundle: what is served.
        rates: of the machine.
        demand: who asks.
        memory: bytes, for weights, states and the rest; a CPU's tables in files lie there too, a GPU's on its host.
        state_format: one of `FORMATS`, of what is float32 in the bundle's own state.

    Raises:
        UsageError: when the history is longer than the bundle serves, or the weights alone do not fit.
    """
    limit = bundle.manifest.max_history
    if limit is not None and demand.history > limit:
        raise UsageError(f"--workload history={demand.history}: the bundle serves at most {limit} tokens")
    weights = sum(f["bytes"] for f in bundle.manifest.files.values() if "bytes" in f)
    tables = 0 if isinstance(rates, GpuRates) else table_bytes(bundle)
    room = int(memory * (1 - _RESERVED)) - weights - tables
    if room < 0:
        has = f" and {tables:,} of tables, whose rows take longer than is predicted from a disk" if tables else ""
        raise UsageError(f"--memory: {memory:,} bytes do not hold the bundle's {weights:,}{has}; give more")
    sizes = {s.name: _bytes(s, demand.history) for s in _kept(bundle.manifest.state, state_format)}
    each = _counted(sizes, demand.history)
    expected = forecast(bundle, rates, demand.history, demand.targets)
    users = room // each
    share = demand.hits(users)
    mean = share * expected.hit + (1 - share) * expected.miss
    hit, miss = (round(1e3 * seconds, 4) for seconds in (expected.hit, expected.miss))
    return Plan(state_format, sum(sizes.values()), each, weights + tables, users, share, hit, miss, 1 / mean)


def table_bytes(bundle: Bundle) -> int:
    """Of the tables that left the graphs."""
    return sum(t.bytes for t in bundle.manifest.tables or ())


def formats_for(bundle: Bundle, gpu: bool) -> tuple[str, ...]:
    """The `FORMATS` that a bundle's state can have: a CPU has no bfloat16, and what is calibrated is so for good."""
    return tuple(
        name for name in FORMATS if (gpu or name != "bfloat16") and (bundle.manifest.rounding is None or name != "int8")
    )


def _kept(state: Sequence[StateSpec], state_format: str) -> list[StateSpec]:
    """A state in another format: engines of another precision change what is float32, and nothing else of it."""
    if state_format == "int8":
        able = {s.name for s in quantizable(state)}
        return [kept for s in state for kept in (kept_as(s, "int8", "token") if s.name in able else (s,))]
    return [dataclasses.replace(s, dtype=state_format) if s.dtype == "float32" else s for s in state]


def _bytes(state: StateSpec, history: int) -> int:
    """Of one user's tensor."""
    known = {TOKENS: history, OFFSETS: 2}
    sizes = (n if isinstance(n, int) else known.get(n, 1) for n in state.shape)
    return math.prod(sizes) * ITEM_BYTES[state.dtype]


def _counted(sizes: Mapping[str, int], history: int) -> int:
    """What a session counts of a user, numbers for its id and version, whose tensors have so many bytes."""
    tensors = {name: np.broadcast_to(np.uint8(0), size) for name, size in sizes.items()}  # which takes none of them
    return cost_of(StateKey(1, 1, "", ""), UserState(tensors, history))


def next_steps(bundle: Bundle, rates: Rates, demand: Demand, memory: int, state_format: str) -> dict[str, float]:
    """What raises throughput, and to how many times itself, the best first."""
    now = plan(bundle, rates, demand, memory, state_format).per_second
    steps = {"twice the memory": plan(bundle, rates, demand, 2 * memory, state_format)}
    half = max(1, demand.history // 2)
    if probe.history_of(bundle.manifest.graphs["request"].inputs, half) == half:  # it is not of a fixed length
        shorter = dataclasses.replace(demand, history=half)
        steps["half the history"] = plan(bundle, rates, shorter, memory, state_format)
    if state_format != "int8" and bundle.manifest.rounding is None:
        steps["states of 8 bits (stca calibrate)"] = plan(bundle, rates, demand, memory, "int8")
    gains = {name: made.per_second / now for name, made in steps.items()}
    return dict(sorted(gains.items(), key=lambda gain: -gain[1]))
