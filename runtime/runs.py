"""How much goes through an engine in one run, and which of several users go together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from stca.runtime.engine_choice import Choice
from stca.specs import TARGETS, TOKENS, USERS
from stca.tensorrt_flavours import largest_sizes


def limits_of(choice: Choice, half: str) -> dict[str, int]:
    """How much one run of a half's engine takes: requests, history tokens, targets."""
    entry = choice.entries.get(half)
    limits = {USERS: entry.requests if entry and entry.requests else sys.maxsize}
    largest = largest_sizes(entry.profiles if entry else ())
    return limits | {dim: largest.get(dim, sys.maxsize) for dim in (TOKENS, TARGETS)}


def parted(sizes: Sequence[Mapping[str, int]], limits: Mapping[str, int]) -> Iterator[slice]:
    """Neighbours that go through an engine together: as many as the limits let, and at least one."""
    begin, total = 0, dict.fromkeys(limits, 0)
    for i, size in enumerate(sizes):
        if i > begin and any(total[dim] + n > limits[dim] for dim, n in size.items()):
            yield slice(begin, i)
            begin, total = i, dict.fromkeys(limits, 0)
        for dim, n in size.items():
            total[dim] += n
    if begin < len(sizes):
        yield slice(begin, len(sizes))
