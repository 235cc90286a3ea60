"""A block of threads as a machine that only orders: a kernel's instructions, and who may touch shared memory when.

See `attention_races.py`. `ptx_warp.py` has what one warp does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

LANES: Final = 32
WORD: Final = 4  # bytes that are told apart
WARP, PRODUCTS, COPIES = range(3)  # agents of each warp; those after them are copies in bulk, of one barrier each

_FLOATS: Final = ("f32", "f16", "f32x2", "f16x2", "bf16x2", "bf16", "ftz")

Value = Any  # an int where lanes agree, an array of them, or None: nothing that an address depends on


@dataclass(frozen=True)
class Instruction:
    """`guard` is a predicate and what it must be; `touched` are registers of products that run beside their warp."""

    at: int
    op: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None = None
    touched: frozenset[str] = frozenset()
    counts: bool = True  # else it makes numbers alone, with a fraction

    @property
    def fractions(self) -> bool:
        """Whether what it makes is no integer."""
        return bool({*self.op.split(".")} & {*_FLOATS}) and not self.op.startswith(("st", "ld", "wgmma"))

    def __str__(self) -> str:
        return f"{self.op} {', '.join(self.operands)} (instruction {self.at})"[:120]


@dataclass(frozen=True)
class Launch:
    """One block: its place, the grid, and the arguments: bytes of a tensor, or an array of int32, or a number."""

    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    arguments: Sequence[Any]


class Wrong(Exception):
    """What a block does that it must not."""


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """A kernel's instructions, and where its labels are. The loop around a wait is its own: waits block here."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".reqntid")) :])
    body = re.sub(r"\[(%\w+), \{[^}]*\}\]", r"[\1]", body)  # coordinates of a copy in bulk: only where it lands matters
    body = re.sub(r"waitLoop:|@!complete bra.uni waitLoop;|\.(reg|pragma)[^;]*;", "", body)
    found, labels = [], {}
    for piece in re.split(r";|(\$\w+:)", body):
        text = " ".join((piece or "").split()).removeprefix("{ ").removeprefix("} ").strip()
        if text.startswith("$"):
            labels[text[:-1]] = len(found)
        elif text not in ("", "{", "}", "} }"):
            guard, op, rest = re.fullmatch(r"(?:@(!?%?\w+) )?(\S+) ?(.*)", text.lstrip("{} ")).groups()
            operands = tuple(x.strip() for x in re.split(r",(?![^{\[]*[}\]])", rest)) if rest else ()
            held = (guard.lstrip("!"), not guard.startswith("!")) if guard else None
            found.append(Instruction(len(found), op, operands, held))
    products = {
        r for i in found if i.op.startswith("wgmma.mma") for x in i.operands[:2] if x[0] == "{" for r in registers_of(x)
    }
    whole = {r for i in found if not i.fractions for r in registers_of(i.operands[0] if i.operands else "")}
    for at, i in enumerate(found):
        touched = frozenset(products & {r for x in i.operands for r in registers_of(x)})
        counts = bool(touched or i.guard or not i.fractions or whole & {*registers_of(i.operands[0])})
        found[at] = replace(i, touched=touched, counts=counts)
    return found, labels


@functools.cache
def registers_of(operand: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%[a-z]+\d+", operand))


@dataclass
class Barrier:
    """One in shared memory: arrivals of a phase that are missing, and bytes; what those who arrived had done."""

    agent: int
    count: int
    missing: int
    clock: np.ndarray
    bytes: int = 0
    phase: int = 0
    done: np.ndarray | None = None


class Block:
    """A block of threads, and who touched each word of its shared memory last."""

    def __init__(
        self, threads: int, shared: int, code: Sequence[Instruction], labels: Mapping[str, int], launch: Launch
    ) -> None:
        self.code, self.labels, self.launch = code, labels, launch
        self.warps = threads // LANES
        agents = 3 * self.warps + 64
        self.clocks = np.zeros((self.warps, agents), np.int64)
        self.clocks[range(self.warps), range(self.warps)] = 1
        self.proxied = np.zeros((self.warps, agents), np.int64)  # of it, what a fence showed to copies and products
        words = shared // WORD
        self.writer, self.written, self.wrote = (np.zeros(words, np.int64) for _ in range(3))
        self.read = np.zeros((2 * self.warps, words), np.int64)
        self.values, self.known = np.zeros(words, np.int64), np.zeros(words, bool)
        self.waiting: dict[str, list[int]] = {}
        self.passed: dict[str, int] = {}
        self.barriers: dict[int, Barrier] = {}
        self.sizes = {i.operands[1]: int(i.operands[2]) for i in code if "expect_tx" in i.op}

    def touch(self, warp: int, agent: int, clock: int, words: np.ndarray, writes: bool, what: Instruction) -> None:
        """An access by `agent`, which `warp` began."""
        if words.size and not 0 <= words.min() <= words.max() < self.written.size:
            raise Wrong(f"outside of shared memory: {what}")
        seen, kind, writer = self.clocks[warp], agent // self.warps, self.writer[words]
        # What copies in bulk and products see after a fence alone.
        plain = np.isin(writer // self.warps, (WARP, COPIES))
        shown = seen if kind in (WARP, COPIES) else self.proxied[warp]
        unseen = self.written[words] > np.where(plain, shown[writer], seen[writer])
        if (unseen & (self.wrote[words] != what.at)).any():  # what many threads hold, many store
            raise Wrong(f"not ordered after a write: {what}")
        if writes:
            if (self.read[:, words] > seen[: len(self.read), None]).any():
                raise Wrong(f"not ordered after a read: {what}")
            self.writer[words], self.written[words], self.wrote[words] = agent, clock, what.at
        else:
            self.read[agent, words] = clock

    def joined(self, warps: Sequence[int]) -> None:
        """All of them know what each knew."""
        for each in (self.clocks, self.proxied):
            each[warps] = each[warps].max(0)
        self.clocks[warps, warps] += 1

    def arrive(self, address: int, count: int, size: int, warp: int, what: Instruction) -> None:
        barrier = self.barrier(address, what)
        barrier.clock = np.maximum(barrier.clock, np.stack([self.clocks[warp], self.proxied[warp]]))
        self.clocks[warp, warp] += 1
        barrier.missing, barrier.bytes = barrier.missing - count, barrier.bytes + size
        self.complete(barrier, what)

    def complete(self, barrier: Barrier, what: Instruction) -> None:
        """Go on to the next phase when all have arrived."""
        if barrier.missing < 0:
            raise Wrong(f"more arrivals than a barrier waits for: {what}")
        if not barrier.missing and not barrier.bytes:
            barrier.done = barrier.clock
            barrier.missing, barrier.phase = barrier.count, barrier.phase + 1

    def barrier(self, address: int, what: Instruction) -> Barrier:
        if address not in self.barriers:
            raise Wrong(f"no barrier there: {what}")
        return self.barriers[address]
