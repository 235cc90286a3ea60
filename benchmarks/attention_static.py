"""What a GPU will be given, without one: each kernel's main loop counted in machine code, and what its counts allow.

The work of `attention.py --static`. A table in the repository (`attention_static.json`) keeps the counts; a compiler or
a change that loses the wide matrix products or the bulk copies, spills, or makes a step longer, fails against it. The
bound beside each is arithmetic on these counts and datasheet rates: no kernel is faster, and none has been measured.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton

from stca.plugins import aot, tiling
from stca.plugins.devices import ARTIFACT_SMS, Device, device_for
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Plan, Shape, Sizes

TABLE = Path(__file__).with_name("attention_static.json")
GROWTH = 1.02  # more instructions a step than this is a step that grew


@dataclass(frozen=True)
class Case:
    """One launch; `limit` is most shared memory, None for all that the GPU has; `goal` is a part of the roofline."""

    name: str
    shape: Shape
    sizes: Sizes
    limit: int | None = None
    goal: float | None = None


_PROJECTED, _ABSORBED = Shape(16, 16, 64, 64, "bfloat16"), Shape(16, 1, 1024, 1024, "bfloat16", tied=True)
CASES = (
    Case("300 x 10k", _PROJECTED, Sizes(300, 10_000, 1), goal=0.6),
    Case("300 x 10k, in an engine", _PROJECTED, Sizes(300, 10_000, 1), PORTABLE_SHARED_LIMIT),
    Case("8 x 10k", _PROJECTED, Sizes(8, 10_000, 1), goal=0.8),
    Case("8 x 10k, absorbed, d = 1024", _ABSORBED, Sizes(8, 10_000, 1)),
    Case("64 requests of 8 x 10k", _PROJECTED, Sizes(512, 640_000, 64)),
    Case("300 x 10k in lists of segments", replace(_PROJECTED, segments=True), Sizes(300, 10_000, 1)),
)
# Matrix products by the first word of their instruction: of a warp group, of tensor memory, of a warp, of a thread.
_PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA")
_BULK = "UTMALDG"  # a copy that the memory unit does by itself
_COUNTED = (*_PRODUCTS, _BULK, "MUFU", "LDGSTS", "LDSM", "LDS", "STS", "BAR")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows so far, again after each kernel; `complaints` at the end. `--write` makes the table anew."""
    kept = {} if args.write else {(row["case"], row["sm"]): row for row in json.loads(TABLE.read_text())["rows"]}
    body: dict[str, Any] = {"triton": triton.__version__, "rows": [], "complaints": []}
    lines = []
    for sm in args.sm or ARTIFACT_SMS:
        for case in CASES:
            plan = tiling.choose(case.shape, case.sizes, device_for(sm), case.limit)
            row = {
                "case": case.name,
                "sm": sm,
                **asdict(plan.tile),
                "parts": plan.parts,
                **counted(case.shape, plan, sm),
            }
            body["rows"].append(row)
            body["complaints"] += [] if args.write else complaints(row, kept.get((case.name, sm)))
            lines.append(_shown(case, row, bound(case, plan, row, device_for(sm))))
            print(lines[-1], file=sys.stderr, flush=True)
            yield body
    print("\n".join([*_HEAD, *lines]), file=sys.stderr)
    if args.write:
        rows = ",\n  ".join(json.dumps(row) for row in body["rows"])
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n  {rows}\n]}}\n', encoding="utf-8")
    print("\n".join(body["complaints"]) or "nothing lost", file=sys.stderr)
    yield body


def counted(shape: Shape, plan: Plan, sm: int) -> dict[str, Any]:
    """The kernel of a plan, compiled and taken apart: registers, spills, and what its main loop is made of."""
    tile, scale = plan.tile, shape.depth**-0.5
    if tile.bulk:
        artifact, _ = aot.compile_bulk(shape, tile, sm, scale)
    else:
        artifact = aot.compile_attend(shape, tile, sm, scale, plan.parts > 1)
    with tempfile.TemporaryDirectory() as folder:
        used = aot.assemble(artifact, cubin := Path(folder, "kernel.cubin"))
        done = subprocess.run([_disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True)
    inner = loops(done.stdout)
    loop = max((x for x in inner if _amount(x, _PRODUCTS)), key=lambda x: (_amount(x, _PRODUCTS), -len(x)), default=[])
    copying = next((x for x in inner if tile.bulk and _amount(x, (_BULK,)) and not _amount(x, _PRODUCTS)), [])
    copied = 2 * tile.block_n * (tile.block_d + tile.block_dv) if copying else 0
    return {
        "registers": used.registers,
        "spilled": used.spill_stores + used.spill_loads,
        "shared": artifact.shared + used.static_shared,
        "instructions": len(loop),
        **({"copying": len(copying)} if copying else {}),
        "counts": counts([*loop, *(x for x in copying if _word(x) == _BULK)]),
        "shared_traffic": sum(map(_shared_bytes, loop)) * _multiplying(tile.warps, tile.bulk) + copied,
    }


def _multiplying(warps: int, bulk: bool) -> int:
    """Warps that multiply: in bulk two groups."""
    return warps * (2 if bulk else 1)


def _disassembler() -> str:
    """NVIDIA's, which comes with Triton."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")


def loops(sass: str) -> list[list[str]]:
    """Instructions, without addresses and predicates, of each innermost loop that has products or bulk copies."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.+?)\s*;", line):
            instructions.append(found[1])
    spans = []
    for i, instruction in enumerate(instructions):
        target = re.match(r"BRA\S*\s+(?:\S+,\s+)?`\((\.L_\w+)\)", instruction)
        start = labels.get(target[1], i + 1) if target else i + 1
        if _amount(instructions[start : i + 1], (*_PRODUCTS, _BULK)):
            spans.append((start, i))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [instructions[a : b + 1] for a, b in inner]


def _amount(loop: Sequence[str], words: Sequence[str]) -> int:
    return sum(_word(x) in words for x in loop)


def _word(instruction: str) -> str:
    return re.split(r"[.\s]", instruction, maxsplit=1)[0]


def counts(loop: Sequence[str]) -> dict[str, int]:
    """How many of each instruction that matters; products by their whole name, which has their size."""
    found = collections.Counter(
        ".".join(x.split()[0].split(".")[:2]) if (word := _word(x)) in _PRODUCTS[:3] else word
        for x in loop
        if _word(x) in _COUNTED
    )
    return dict(sorted(found.items()))


def _shared_bytes(instruction: str) -> float:
    """What one warp's instruction moves through shared memory."""
    name = instruction.split()[0]
    if (word := _word(name)) == "HGMMA":  # four warps together read the right operand, and the left one unless it is R…
        rows, columns, depth = map(int, name.split(".")[1].split("x"))
        return 2 * depth * (columns + (rows if len(re.findall(r"\bR\d+", instruction)) < 3 else 0)) / 4
    if word == "LDSM":
        return 128 * int(last) if (last := name.rsplit(".", 1)[-1]).isdigit() else 128
    if word in ("LDS", "STS", "LDGSTS"):
        width = re.search(r"\.(64|128)\b", name)
        return 32 * (int(width[1]) // 8 if width else 4)
    return 0


def complaints(row: Mapping[str, Any], kept: Mapping[str, Any] | None) -> list[str]:
    """What is worse than the table says."""
    where = f"SM {row['sm']}, {row['case']}"
    if kept is None:
        return [f"{where}: is not in the table; --write adds it"]
    found = []
    for word in (*_PRODUCTS, _BULK):
        has, had = (any(name.startswith(word) for name in one["counts"]) for one in (row, kept))
        if had and not has:
            found.append(f"{where}: lost {word}")
    if row["spilled"] > kept["spilled"]:
        found.append(f"{where}: spills {row['spilled']} bytes, {kept['spilled']} before")
    if (now := _slots(row)) > GROWTH * (before := _slots(kept)):
        found.append(f"{where}: {now:.0f} issue slots per 128 x 128, {before:.0f} before")
    return found


def _slots(row: Mapping[str, Any]) -> float:
    """Instructions that a scheduler, one of four, issues for 128 rows against 128 tokens."""
    return _issued(row) * 128 * 128 / (row["block_m"] * row["block_n"])


def _issued(row: Mapping[str, Any]) -> float:
    """Instructions that a scheduler issues for a step."""
    multiplying = row["instructions"] * _multiplying(row["warps"], row.get("bulk", False))
    return float(multiplying + row.get("copying", 0) * row["warps"]) / 4


def bound(case: Case, plan: Plan, row: Mapping[str, Any], device: Device) -> dict[str, float]:
    """Cycles of a block's step on each unit of a multiprocessor, and microseconds no launch can be faster than.

    `floor` is the roofline: bytes, products and exponentials at the GPU's full rates. `seconds` is the busiest unit of
    the busiest multiprocessor over all its blocks' steps, with launches, first loads and the join of parts.
    """
    shape, sizes, tile = case.shape, case.sizes, plan.tile
    each, per_clock = sizes.tokens // sizes.requests, device.multiprocessors * device.clock
    token = shape.depth + (0 if tiling.is_tied(shape, tile) else tile.block_dv)
    cycles = {
        "matrix": 2 * tile.block_m * tile.block_n * (shape.depth + tile.block_dv) * per_clock / device.matrix,
        "exponential": row["counts"].get("MUFU", 0) * 2 * _multiplying(tile.warps, tile.bulk),
        "issue": _issued(row),
        "shared": row["shared_traffic"] / 128,
        "cache": tile.block_n * token * shape.element * per_clock / device.cache_bandwidth,
    }
    rows = sizes.targets * shape.group // sizes.requests
    columns = shape.key_heads * -(-shape.value_depth // tile.block_dv)
    blocks = sizes.requests * -(-rows // tile.block_m) * columns * plan.parts
    part = each / (tile.block_n * plan.parts)  # in bulk, parts differ by one step; else all but the last are as long
    steps = -(-blocks // device.multiprocessors) * (part if tile.bulk else -(-part // 1))
    moved = shape.element * (
        sizes.targets * shape.heads * (shape.depth + shape.value_depth)
        + sizes.tokens * shape.key_heads * (shape.depth + (0 if shape.tied else shape.value_depth))
    )
    logits = sizes.targets * shape.heads * each
    products = 2 * logits * (shape.depth + shape.value_depth) / device.matrix
    floor = max(moved / device.bandwidth, products, logits / device.exponentials)
    inside = max(steps * max(cycles.values()) / device.clock + 4 * tiling.MEMORY_LATENCY, moved / device.bandwidth)
    total = tiling.LAUNCH + inside + tiling.combine_seconds(shape, sizes, plan.parts, device, tile.bulk)
    return {**cycles, "floor": floor, "seconds": total}


_UNITS = ("matrix", "exponential", "issue", "shared", "cache")
_HEAD = (
    f"| launch | SM | tile, warps, stages, parts | registers | products | slots | {' / '.join(_UNITS)} cycles | "
    "not before, µs | of the roofline | goal |",
    "|---" * 10 + "|",
)


def _shown(case: Case, row: Mapping[str, Any], at: Mapping[str, float]) -> str:
    products = next((name for word in _PRODUCTS for name in row["counts"] if _word(name) == word), "none")
    cells = (
        row["case"],
        row["sm"],
        f"{row['block_m']}x{row['block_n']}, {row['warps']}, {row['stages']}, {row['parts']}"
        + ", in bulk" * row.get("bulk", False),
        f"{row['registers']}" + f", {row['spilled']} B spilled" * (row["spilled"] > 0),
        f"{row['counts'].get(products, 0)} {products}",
        f"{_slots(row):.0f}",
        " / ".join(f"{at[unit]:.0f}" for unit in _UNITS),
        f"{1e6 * at['seconds']:.1f}",
        f"{100 * at['floor'] / at['seconds']:.0f} %",
        f"{100 * case.goal:.0f} %" if case.goal else "",
    )
    return f"| {' | '.join(map(str, cells))} |"
