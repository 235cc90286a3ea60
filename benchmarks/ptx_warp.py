"""One warp of a block: integers, addresses and predicates as a GPU computes them, and what it waits for.

See `attention_races.py`. Numbers with a fraction are nothing here: no address depends on one, or this says so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from ptx_block import COPIES, LANES, PRODUCTS, WORD, Barrier, Block, Instruction, Value, Wrong, registers_of

BASE: Final = 1 << 40  # tensors lie this far from one another
_IGNORED: Final = (
    "setmaxnreg", "griddepcontrol", "fence.proxy.tensormap", "bar.warp", "cp.async.bulk.commit", "cp.async.bulk.wait",
)  # fmt: skip


def run(block: Block) -> None:
    """All warps to their end.

    Raises:
        Wrong: an access that nothing orders, one beyond a tensor, or a wait without an end.
    """
    running = {w: Warp(block, w).run() for w in range(block.warps)}
    blocked: dict[int, tuple[Callable[[], bool], Instruction]] = {}
    while running:
        ready = [w for w in running if w not in blocked or blocked[w][0]()]
        if not ready:
            raise Wrong(f"warps wait for ever: {next(iter(blocked.values()))[1]}")
        for w in ready:
            blocked.pop(w, None)
            stopped = next(running[w], None)
            if stopped is None:
                del running[w]
            else:
                blocked[w] = stopped


class Warp:
    """Registers, and the next instruction of each lane: the lanes behind go first, so that they meet again."""

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index = block, index
        self.registers: dict[str, Value] = {}
        self.at = np.zeros(LANES, np.int64)
        self.groups, self.products = 0, 0  # of copies and of products that are complete but for a wait
        self.unfenced: set[str] | frozenset[str] = {r for i in block.code for r in i.touched}
        self.pending: dict[str, int] = {}
        self.active = np.ones(LANES, bool)

    def run(self) -> Iterator[tuple[Callable[[], bool], Instruction]]:
        """To the end; yields when something else must happen first: what tells whether it has, and what waits."""
        code, steps = self.block.code, 0
        while (at := int(self.at.min())) < len(code):
            self.active = self.at == at
            self.at[self.active] += 1
            instruction, steps = code[at], steps + 1
            if not instruction.counts:
                continue
            if steps > 200_000:
                raise Wrong(f"no end: {instruction}")
            if instruction.guard is not None:
                name, wanted = instruction.guard
                holds = self.registers.get(name)
                if holds is None:
                    raise Wrong(f"depends on a number that is not computed here: {instruction}")
                self.active = self.active & (np.broadcast_to(holds, LANES).astype(bool) == wanted)
                if not self.active.any():
                    continue
            if instruction.touched:
                self.hold(instruction)
            if (waits := self.step(instruction)) is not None and not waits():
                yield waits, instruction

    def hold(self, what: Instruction) -> None:
        """Registers of products are touched between a wait and a fence alone."""
        if what.op.startswith("wgmma.mma"):
            if found := what.touched & self.unfenced:
                raise Wrong(f"no fence after {min(found)} was used: {what}")
            return
        if found := what.touched & self.pending.keys():
            raise Wrong(f"{min(found)} is not there yet: {what}")
        self.unfenced |= what.touched

    def step(self, what: Instruction) -> Callable[[], bool] | None:
        """One instruction; what it waits for."""
        op, x = what.op, what.operands
        kind = op.split(".")[0]
        if op.startswith(_IGNORED):
            return None
        if kind == "bra":
            self.at[self.active] = self.block.labels[x[0]]
        elif kind == "ret":
            self.at[self.active] = len(self.block.code)
        elif kind in ("bar", "barrier"):
            return self.meet(x[0], int(x[1]) if len(x) > 1 else LANES * self.block.warps)
        elif kind == "mbarrier":
            return self.barrier(what)
        elif kind == "wgmma":
            self.product(what)
        elif op == "fence.proxy.async.shared::cta":
            mine = self.index
            self.block.proxied[mine] = np.maximum(self.block.proxied[mine], self.block.clocks[mine])
            self.block.clocks[mine, mine] += 1
        elif op.startswith("cp.async."):
            self.copy(what)
        elif kind in ("ld", "st", "ldmatrix", "stmatrix", "tensormap"):
            self.access(what)
        else:
            self.compute(what)
        return None

    def meet(self, name: str, threads: int) -> Callable[[], bool]:
        block = self.block
        here, turn = block.waiting.setdefault(name, []), block.passed.get(name, 0)
        here.append(self.index)
        if LANES * len(here) >= threads:
            block.joined(block.waiting.pop(name))
            block.passed[name] = turn + 1
        return lambda: block.passed.get(name, 0) > turn

    def barrier(self, what: Instruction) -> Callable[[], bool] | None:
        """One in shared memory: its own words are accesses, too."""
        block, mine, x = self.block, self.index, what.operands
        waits, makes = "try_wait" in what.op, what.op.startswith(("mbarrier.init", "mbarrier.inval"))
        address = self.address(x[0] if makes else x[1])
        address = int(address if isinstance(address, int) else address[self.active][0])
        words = np.array([address // WORD, address // WORD + 1])
        block.touch(mine, mine, int(block.clocks[mine, mine]), words, makes, what)
        if ".init" in what.op:
            agent, count = 3 * block.warps + len(block.barriers), int(x[1])
            block.barriers[address] = Barrier(agent, count, count, np.zeros((2, block.clocks.shape[1]), np.int64))
        elif ".inval" in what.op:
            block.barriers.pop(address, None)
        elif waits:
            parity, barrier = self.one(x[2]) & 1, block.barrier(address, what)
            return lambda: self.passes(barrier, parity)
        else:
            number, expects, lanes = int(x[2]) if len(x) > 2 else 1, "expect_tx" in what.op, int(self.active.sum())
            block.arrive(address, lanes * (1 if expects else number), lanes * expects * number, mine, what)
        return None

    def passes(self, barrier: Barrier, parity: int) -> bool:
        """The phase before the present one has this parity; before the first one, 1 passes."""
        if barrier.phase & 1 == parity:
            return False
        if barrier.done is not None:
            mine, (clock, proxied) = self.index, barrier.done
            self.block.clocks[mine] = np.maximum(self.block.clocks[mine], clock)
            self.block.proxied[mine] = np.maximum(self.block.proxied[mine], proxied)
        return True

    def copy(self, what: Instruction) -> None:
        block, mine, x = self.block, self.index, what.operands
        agent = COPIES * block.warps + mine
        if what.op == "cp.async.commit_group":
            self.groups += 1
        elif what.op == "cp.async.wait_group":
            block.clocks[mine, agent] = max(block.clocks[mine, agent], self.groups - int(x[0]))
        elif what.op.startswith("cp.async.bulk.tensor"):
            address, size = self.one(x[0]), block.sizes.get(x[2], 0)
            barrier = block.barrier(self.one(x[2]), what)
            clock = int(barrier.clock[0, barrier.agent]) + 1
            words = np.arange(address // WORD, (address + size) // WORD)
            block.touch(mine, barrier.agent, clock, words, True, what)
            barrier.clock = barrier.clock.copy()
            barrier.clock[:, barrier.agent] = clock
            barrier.bytes -= size
            block.complete(barrier, what)
        else:
            if len(x) < 4 or (size := self.value(x[3])) is None:
                size = int(x[2], 0)
            self.inside(x[1], np.broadcast_to(size, LANES), what)
            block.touch(mine, agent, self.groups + 1, self.words(x[0], int(x[2], 0)), True, what)

    def product(self, what: Instruction) -> None:
        block, mine = self.block, self.index
        agent = PRODUCTS * block.warps + mine
        if "fence" in what.op:
            self.unfenced = set()
        elif "commit" in what.op:
            self.products += 1
        elif "wait" in what.op:
            done = self.products - int(what.operands[0])
            block.clocks[mine, agent] = max(block.clocks[mine, agent], done)
            self.pending = {r: group for r, group in self.pending.items() if group > done}
        else:
            rows, columns = map(int, re.search(r"m(\d+)n(\d+)k16", what.op).groups())
            for left, height in ((True, rows), (False, columns)):
                if (operand := what.operands[1 if left else 2]).startswith("{"):
                    continue
                words = _described(self.one(operand), height, not left and what.operands[-1] == "1")
                block.touch(mine, agent, self.products + 1, words, False, what)
            self.pending |= dict.fromkeys(what.touched, self.products + 1)

    def access(self, what: Instruction) -> None:
        op, x, mine = what.op, what.operands, self.index
        kind, block = op.split(".")[0], self.block
        loads = kind in ("ld", "ldmatrix")
        if ".param" in op:
            index = int(re.search(r"_param_(\d+)", x[1])[1])
            given = block.launch.arguments[index]
            self.set(x[0], given if isinstance(given, int) and "64" not in op else BASE * (index + 1))
            return
        place, registers = (x[1], x[0]) if loads else (x[0], x[1] if len(x) > 1 else "")
        each = [int(n) for n in re.findall(r"\.[bsuf](\d+)$", op)]
        count = int(found[1]) if (found := re.search(r"\.v(\d)", op)) else 1
        size = 16 if "matrix" in kind else 128 if kind == "tensormap" else count * each[0] // 8
        names = registers_of(registers) if loads else [n.strip() for n in registers.strip("{} ").split(",")]
        if ".global" in op and kind != "tensormap":
            self.inside(place, np.full(LANES, size), what)
            for i, name in enumerate(names if loads else ()):
                self.set(name, self.looked_up(place, i))
            return
        if kind == "tensormap" and "cp_fenceproxy" in op:
            place, loads = x[1], True
        if "matrix" in kind:
            self.active = self.active & (np.arange(LANES) < 8 * int(re.search(r"\.x(\d)", op)[1]))
        words = self.words(place, size)
        block.touch(mine, mine, int(block.clocks[mine, mine]), words, not loads, what)
        if kind in ("ldmatrix", "stmatrix", "tensormap"):
            for name in names if kind == "ldmatrix" else ():
                self.set(name, None)
            return
        self.kept(names, place, each[0] // 8, loads)

    def kept(self, names: Sequence[str], place: str, size: int, loads: bool) -> None:
        """What integers lie in shared memory, as far as somebody stored them."""
        values, known = self.block.values, self.block.known
        address = np.broadcast_to(self.address(place), LANES)
        for i, name in enumerate(names):
            at = (address[self.active] + i * size) // WORD
            if not loads:
                value = self.value(name)
                known[at] = value is not None
                values[at] = 0 if value is None else np.broadcast_to(value, LANES)[self.active]
            elif not known[at].all():
                self.set(name, None)
            else:
                found = np.zeros(LANES, np.int64)
                found[self.active] = values[at]
                self.set(name, found >> 8 * (address % WORD) & 255 if size == 1 else found)

    def inside(self, place: str, size: np.ndarray, what: Instruction) -> None:
        """Bytes of a tensor that is there."""
        address = np.broadcast_to(self.address(place), LANES)[self.active]
        size = size[self.active]
        address = address[size > 0]
        if not address.size:
            return
        index, first = address // BASE - 1, address % BASE
        tensor = self.block.launch.arguments[int(index[0])]
        held = tensor.nbytes if isinstance(tensor, np.ndarray) else tensor
        if (index != index[0]).any() or (first + size[size > 0] > held).any():
            raise Wrong(f"outside of tensor {int(index[0])}: {what}")

    def looked_up(self, place: str, i: int) -> Value:
        address = np.broadcast_to(self.address(place), LANES)
        tensor = self.block.launch.arguments[int(address[self.active][0]) // BASE - 1]
        if not isinstance(tensor, np.ndarray):
            return None
        found = np.zeros(LANES, np.int64)
        found[self.active] = tensor[address[self.active] % BASE // 4 + i]
        return found

    def words(self, place: str, size: int) -> np.ndarray:
        address = np.broadcast_to(self.address(place), LANES)[self.active]
        return np.unique(address[:, None] // WORD + np.arange(-(-size // WORD)))

    def address(self, place: str) -> Value:
        base, _, more = place.strip("[] ").partition("+")
        if (value := self.value(base.strip())) is None:
            raise Wrong(f"an address depends on a number that is not computed here: {place}")
        return value + int(more or 0)

    def one(self, operand: str) -> int:
        """A value on which lanes agree."""
        value = self.address(operand)
        return int(value if np.isscalar(value) else value[self.active][0])

    def value(self, name: str) -> Value:
        if name.startswith("%"):
            special = re.fullmatch(r"%(n?)(tid|ctaid)\.([xyz])", name)
            if special is None:
                return self.registers.get(name)
            if special[2] == "tid":
                return self.index * LANES + np.arange(LANES)
            return (self.block.launch.grid if special[1] else self.block.launch.block)["xyz".index(special[3])]
        if name == "global_smem":
            return 0
        return None if name.startswith("0f") else int(name, 0)

    def set(self, name: str, value: Value) -> None:
        if not self.active.all() and value is not None:
            before = self.registers.get(name, 0)
            value = None if before is None else np.where(self.active, value, before)
        self.registers[name] = value

    def compute(self, what: Instruction) -> None:
        op, x = what.op, what.operands
        targets = registers_of(x[0])
        parts = op.split(".")
        if parts[0] == "elect":
            self.set(targets[0], 0)
            self.set(targets[1], np.arange(LANES) == int(np.flatnonzero(self.active)[0]))
            return
        known = [self.value(name) if "{" not in name else None for name in x[1:]]
        if what.fractions or (parts[0] in ("mma", "mov") and "{" in "".join(x)) or None in map(_nothing, known):
            for name in targets:
                self.set(name, None)
            return
        self.set(targets[0], _computed(parts, known, self.active))


def _nothing(value: Value) -> Value:
    return value if value is None else 0


def _described(descriptor: int, height: int, across: bool) -> np.ndarray:
    """Words that a product reads, at least: groups of eight rows, 1024 bytes each, or 16 rows of `height` elements."""
    if descriptor >> 62 != 1 or (descriptor >> 32) & 0x3FFF != 1024 >> 4:
        raise Wrong("rows of a product that are not 128 bytes, swizzled, lie otherwise than this knows")
    first = (descriptor & 0x3FFF) << 4
    if across:
        return np.arange(first // WORD, (first + 2 * 16 * height) // WORD)
    rows = first + np.arange(0, height // 8 * 1024, 128)
    return (rows[:, None] // WORD + np.arange(8)).ravel()


def _computed(parts: Sequence[str], known: Sequence[Value], active: np.ndarray) -> Value:
    """An instruction on integers, in the bits that its type has."""
    name, kind = parts[0], parts[-1]
    bits = _bits(kind)
    unsigned = kind[0] == "u"
    if kind[0] in "usb" and not (name == "shr" and kind[0] == "s"):
        cut = len(known) if "wide" not in parts else 2
        raw = unsigned or (name in ("shr", "bfe", "shf") and kind[0] != "s")
        known = [*(_wrapped(v, bits, raw) for v in known[:cut]), *known[cut:]]
    a, b, c = (*known, 0, 0, 0)[:3]
    if name == "setp":
        compare = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
        return (compare | {"eq": np.equal, "ne": np.not_equal})[parts[1]](a, b)
    if kind == "pred":
        return {"and": np.logical_and, "or": np.logical_or, "not": lambda a, _: np.logical_not(a),
                "mov": lambda a, _: a != 0, "xor": np.logical_xor}[name](a, b)  # fmt: skip
    if name == "selp":
        return np.where(known[2], a, b) if not np.isscalar(known[2]) else (a if known[2] else b)
    if name == "shfl":
        lanes = np.arange(LANES)
        source = {"idx": b, "bfly": lanes ^ b, "up": np.where(lanes - b >= 0, lanes - b, lanes)}[parts[2]]
        return np.broadcast_to(a, LANES)[np.broadcast_to(source, LANES)]
    if name == "redux":
        return int(np.broadcast_to(a, LANES)[active].sum())
    if name == "bfe":
        field_ = (a >> b) & ((1 << c) - 1)
        return field_ if unsigned or kind[0] == "b" else _wrapped(field_, int(c), False)
    wide = "wide" in parts
    made = {
        "mov": lambda: a, "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "mad": lambda: a * b + c,
        "shl": lambda: a << b, "shr": lambda: a >> b, "and": lambda: a & b, "or": lambda: a | b, "xor": lambda: a ^ b,
        "not": lambda: ~a, "neg": lambda: -a, "min": lambda: np.minimum(a, b), "max": lambda: np.maximum(a, b),
        "cvt": lambda: a, "cvta": lambda: a, "div": lambda: np.trunc(a / b).astype(np.int64),
        "shf": lambda: b << c | a >> bits - c,
    }  # fmt: skip
    if name not in made:
        raise Wrong(f"no such instruction here: {'.'.join(parts)}")
    result = made[name]() if "hi" not in parts else a * b >> bits
    return _wrapped(result, bits if name != "cvt" else _bits(parts[-2]), False) if not wide else result


@functools.cache
def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind) or 1)


def _wrapped(value: Value, bits: int, unsigned: bool) -> Value:
    if bits >= 64 or value is None or np.asarray(value).dtype == bool:
        return value
    half = 0 if unsigned else 1 << bits - 1
    return ((value + half) & ((1 << bits) - 1)) - half
