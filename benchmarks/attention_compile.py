"""What the compiler makes of the kernels that the cost model picks: registers, spills and shared memory, without a GPU.

    python benchmarks/attention_compile.py --out benchmarks/results/attention-compile.json [--sm 90]

For each GPU and shape, 1, 8, 32 and 300 targets over 10,000 tokens, with the GPU's own shared memory and within 48 KiB,
the model's pick is compiled and assembled, each distinct kernel once. Prints the two tables of docs/attention.md; the
JSON has every kernel. It takes about 20 minutes on one core. `--shipped DIR` compiles nothing and prints the table of
docs/tensorrt_plugin.md from what `python -m stca.plugins.artifacts --out DIR` wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from stca.plugins import aot, tiling
from stca.plugins.devices import ARTIFACT_SMS, device_for
from stca.plugins.tiling import PORTABLE_SHARED_LIMIT, Plan, Shape, Sizes

# Heads, head size and dtype; absorbed, key and value are one tensor.
PROJECTED = (
    *((8, 32, "bfloat16"), (16, 64, "bfloat16"), (8, 128, "bfloat16"), (4, 256, "bfloat16"), (4, 512, "bfloat16")),
    *((8, 32, "float16"), (16, 64, "float16"), (8, 32, "float32"), (16, 64, "float32")),
)
ABSORBED = (
    *((8, 256, "bfloat16"), (8, 512, "bfloat16"), (16, 1024, "bfloat16")),
    *((8, 256, "float16"), (8, 256, "float32"), (16, 1024, "float32")),
)
SHAPES = tuple(
    Shape(heads, heads if shapes is PROJECTED else 1, depth, depth, dtype, tied=shapes is ABSORBED)
    for shapes in (PROJECTED, ABSORBED)
    for heads, depth, dtype in shapes
)
TARGETS, TOKENS = (1, 8, 32, 300), 10_000
# Rows of the first table, on SM 90: heads and head size of a bfloat16 shape, targets, and whether within 48 KiB.
SHOWN = (
    ((16, 64), 8, False),
    ((16, 64), 32, False),
    ((16, 64), 300, False),
    ((16, 64), 300, True),
    ((8, 256), 1, False),
    ((8, 256), 300, False),
    ((8, 512), 8, False),
    ((16, 1024), 8, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here, after each kernel")
    parser.add_argument("--sm", action="append", type=int, choices=ARTIFACT_SMS, help="default: all of them")
    parser.add_argument("--shipped", type=Path, metavar="DIR", help="only sum up the artifacts in this folder")
    args = parser.parse_args()
    if args.shipped:
        print(shipped(json.loads((args.shipped / "artifacts.json").read_text())["kernels"]))
        return
    kernels: dict[tuple[int, Shape, tiling.Tile, bool], dict[str, Any]] = {}
    for sm, shape, targets, portable, plan in picks(args.sm or ARTIFACT_SMS):
        key = (sm, shape, plan.tile, plan.parts > 1)
        if key not in kernels:
            kernels[key] = {"sm": sm, **dataclasses.asdict(shape), **_compiled(*key), "picked": []}
            print(len(kernels), json.dumps(kernels[key]), file=sys.stderr, flush=True)
        kernels[key]["picked"].append({"targets": targets, "portable": portable, "parts": plan.parts})
        if args.out:
            rows = ",\n ".join(map(json.dumps, kernels.values()))
            head = json.dumps({"triton": triton.__version__, "tokens": TOKENS})
            args.out.write_text(f'{head[:-1]}, "kernels": [\n {rows}\n]}}\n', encoding="utf-8")
    print(shown(list(kernels.values())), by_sm(list(kernels.values())), sep="\n\n")


def picks(sms: tuple[int, ...]) -> Iterator[tuple[int, Shape, int, bool, Plan]]:
    """Every pick of the model: SM, shape, targets, whether within 48 KiB, plan."""
    for sm, shape, targets, portable in itertools.product(sms, SHAPES, TARGETS, (False, True)):
        limit = PORTABLE_SHARED_LIMIT if portable else device_for(sm).shared_limit
        try:
            plan = tiling.choose(shape, Sizes(targets, TOKENS, 1), device_for(sm), limit)
        except ValueError:
            print(f"SM {sm}: no tile of {shape} within {limit} bytes", file=sys.stderr, flush=True)
            continue
        yield sm, shape, targets, portable, plan


def _compiled(sm: int, shape: Shape, tile: tiling.Tile, split: bool) -> dict[str, Any]:
    artifact = aot.compile_attend(shape, tile, sm, shape.depth**-0.5, split)
    used = aot.assemble(artifact)
    shared, spilled = artifact.shared + used.static_shared, used.spill_stores + used.spill_loads
    return {**dataclasses.asdict(tile), "registers": used.registers, "spilled": spilled, "shared": shared}


def shown(kernels: list[dict[str, Any]]) -> str:
    """The table of some picks on SM 90."""
    lines = [
        "| shape | targets × tokens | rows × tokens, warps, stages | parts | registers | shared memory |",
        "|---|---|---|---|---|---|",
    ]
    for (heads, depth), targets, portable in SHOWN:
        for k in kernels:
            if (k["sm"], k["heads"], k["depth"], k["dtype"]) != (90, heads, depth, "bfloat16"):
                continue
            for pick in k["picked"]:
                if (pick["targets"], pick["portable"]) == (targets, portable):
                    form = ("absorbed" if k["key_heads"] == 1 else "projected") + f" {heads} × {depth}"
                    part = f" ({k['block_dv']} of `D_v`)" if k["block_dv"] < k["value_depth"] else ""
                    tile = f"{k['block_m']} × {k['block_n']}{part}, {k['warps']}, {k['stages']}"
                    sizes = f"{form}{', within 48 KiB' * portable} | {targets} × 10k"
                    used = f"{k['registers']} | {round(k['shared'] / 1024)} KiB"
                    lines.append(f"| {sizes} | {tile} | {pick['parts']} | {used} |")
    return "\n".join(lines)


def by_sm(kernels: list[dict[str, Any]]) -> str:
    """The table of all kernels, a row for each SM."""
    lines = ["| SM | kernels | most registers | most shared memory | spilling |", "|---|---|---|---|---|"]
    for sm in sorted({k["sm"] for k in kernels}):
        of = [k for k in kernels if k["sm"] == sm]
        spilled = [f"{k['spilled']} bytes ({k['dtype']})" for k in of if k["spilled"]]
        spilling = f"{len(spilled)}: {', '.join(spilled)}" if spilled else "none"
        most = (max(k["registers"] for k in of), f"{round(max(k['shared'] for k in of) / 1024)} KiB")
        lines.append(f"| {sm} | {len(of)} | {most[0]} | {most[1]} | {spilling} |")
    return "\n".join(lines)


def shipped(kernels: list[dict[str, Any]]) -> str:
    """The most that any artifact of a model and form needs on each SM; `combine_kernel` by head size."""
    sms = sorted({k["sm"] for k in kernels})
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for k in kernels:
        name = f"combine, D_v = {k['value_depth']}"
        if k["kernel"] == "attend_kernel":
            form = "projected" if k["key_heads"] > 1 else "absorbed" + ", tied" * k["tied"]
            name = f"({k['depth'] * k['key_heads']}, {k['heads']}) {form}"
        rows.setdefault(name, {}).setdefault(k["sm"], []).append(k)
    lines = [f"| kernels | {' | '.join(f'SM {sm}' for sm in sms)} |", f"|{' --- |' * (len(sms) + 1)}"]
    for name, of_sm in rows.items():
        cells = []
        for of in (of_sm.get(sm, []) for sm in sms):
            most = [max((k[what] for k in of), default=0) for what in ("registers", "shared", "static_shared")]
            spilled = max((k["spill_stores"] for k in of), default=0)
            cell = f"{most[0]} · {(most[1] + most[2]) / 1024:.1f}"
            cells.append(cell + (f" · {spilled} B spilled" if spilled else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
