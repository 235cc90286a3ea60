"""Parity and speed of the operator's kernels, against what a user would otherwise call.

    python benchmarks/attention.py --out benchmarks/results/NAME.json

On a CUDA GPU: our kernels in both forms against float64, over dtypes, model sizes and ragged batches; then their speed
beside PyTorch's scaled_dot_product_attention with each of its backends, FlexAttention, torch.compile of the plain form,
and the unfused graph, over histories x targets x model sizes. Each row has its bytes, operations and roofline, from a
copy and a matrix product measured in the same run, and the fraction reached. `--only parity` and `--only speed` do one
of the two; `--only ptx` measures the kernels that an engine embeds, launched with the arguments TensorRT would pass.

`--tune FILE` times the cost model's best plans instead, sizes that FILE lacks first, and puts the fastest of each into
that table, which overrules the model, as soon as it is known; rows of other GPUs and sizes stay.

On a CPU the same command interprets the kernels at small sizes, which proves numbers and says nothing about a GPU's
speed, and measures the forms of the operator that a CPU runs: time and peak memory at 10,000 tokens and 300 targets.

`--static` needs no GPU and measures nothing: it compiles the kernels for each SM, counts their machine code, holds it
against `attention_static.json` (`--write` makes that anew), and prints what the counts allow beside the goals. It fails
when wide products or bulk copies are lost, a kernel spills, or a step grew. `--sm 90` takes one SM.

`--races` needs no GPU either: it runs a block of each of these kernels' PTX as far as addresses and barriers go, fails
on accesses to shared memory that nothing orders, or outside of tensors, and takes out each barrier in turn.

The JSON goes to stdout and, after each row, to `--out`; progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

SIZES = ((256, 8), (512, 8), (1024, 16))


def main() -> None:
    args = _arguments()
    if args.child:
        import attention_cpu

        attention_cpu.child(args.child)
        return
    command = "python benchmarks/attention.py " + " ".join(sys.argv[1:])
    head: dict[str, Any] = {"command": command.strip(), "device": args.device, "torch": torch.__version__}
    if args.static:
        import attention_static

        bodies = attention_static.run(args)
    elif args.races:
        import attention_races

        bodies = attention_races.run(args)
    elif args.device == "cuda":
        import attention_cuda

        bodies = attention_cuda.run(args, SIZES)
    else:
        import attention_cpu

        bodies = attention_cpu.run(args)
    text, passed = "", True
    for body in bodies:  # each has all that the one before had
        text = json.dumps({**head, **body}, indent=1)
        passed = body.get("parity", {}).get("passed", True) and not body.get("complaints")
        if args.out:
            Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text)
    if not passed:
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("parity", "speed", "ptx"), help="measure one thing; ptx needs a GPU")
    parser.add_argument("--history", type=numbers, default=[512, 2048, 10_000, 65_536], help="tokens, e.g. 512,10000")
    parser.add_argument("--targets", type=numbers, default=[1, 8, 32, 128, 300, 1024], help="targets, e.g. 8,300")
    parser.add_argument("--skip", type=int, default=0, help="with --only: leave out as many, done by an earlier run")
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="stop measuring after this and say so")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="only put the fastest measured plans into this table")
    parser.add_argument("--static", action="store_true", help="count compiled kernels; no GPU")
    parser.add_argument("--races", action="store_true", help="order of accesses to shared memory; no GPU, minutes")
    parser.add_argument("--write", action="store_true", help="with --static: keep these counts as the table")
    parser.add_argument("--sm", type=int, action="append", help="with --static or --races: only this; may be repeated")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu" and (args.tune or args.only == "ptx"):
        parser.error("--tune and --only ptx need a CUDA GPU that torch can use")
    if (args.write and not args.static) or (args.sm and not (args.static or args.races)) or (args.write and args.sm):
        parser.error("--write is of --static, whose table has every SM; --sm is of --static or --races")
    if args.skip and not args.only:
        parser.error("--skip goes with --only: say of what")
    return args


if __name__ == "__main__":
    main()
