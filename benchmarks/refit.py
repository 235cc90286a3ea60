"""How long a refit takes beyond reading and writing the weights, at 23 and 133 million parameters.

    python benchmarks/refit.py [--threads 1]

For each size: export a model, change every weight, put the new weights into the bundle, and time the steps. Wall time
and processor time are given, because on a shared machine only the second says what the work costs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import tempfile
import time
from pathlib import Path

SIZES = {
    "23 M": {"items": 50_000, "item_width": 128, "width": 512, "heads": 8, "layers": 4, "ffn_expansion": 1},
    "133 M": {"items": 130_000, "item_width": 320, "width": 1024, "heads": 16, "layers": 4, "ffn_expansion": 2},
}


def mark(step: str, marks: list[tuple[str, float, float]]) -> None:
    """Note when a step begins, by the wall and by the processor."""
    marks.append((step, time.monotonic(), time.process_time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    args = parser.parse_args()

    import torch

    from stca.engines.refit import refit
    from stca.export.pipeline import export_checkpoint
    from stca.export.reference.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from stca.export.reference.config import Field, StcaConfig
    from stca.export.reference.module import Stca

    torch.set_num_threads(args.threads)
    print(f"{os.cpu_count()} cores, {args.threads} threads, load {os.getloadavg()[0]:.1f}")
    print("| size | parameters | step | wall, s | processor, s |")
    print("|---|---|---|---|---|")
    for size, sizes in SIZES.items():
        torch.manual_seed(0)
        config = StcaConfig(
            tasks=("finish", "skip", "head"),
            field_width=32,
            history_fields=(Field("action", 8), Field("category", 500)),
            user_fields=(Field("segment", 100),),
            request_fields=(Field("device", 5),),
            target_fields=(Field("category", 500),),
            mixer_head_width=32,
            **sizes,
        )
        with tempfile.TemporaryDirectory() as scratch:
            model = Stca(config)
            parameters = sum(p.numel() for p in model.parameters())
            bundle, new = Path(scratch, "bundle"), Path(scratch, "new.safetensors")
            export_checkpoint(Checkpoint(config, model.state_dict()), bundle, form="projected", prove=lambda *_: {})
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.01)
            save_checkpoint(new, model)
            del model
            load_checkpoint(new)  # into the page cache, for both that follow
            marks: list[tuple[str, float, float]] = []
            mark("start", marks)
            refit(bundle, new, progress=functools.partial(mark, marks=marks))
            mark("end", marks)
            steps = [(a[0], b[1] - a[1], b[2] - a[2]) for a, b in itertools.pairwise(marks)]
            steps.append(("all", marks[-1][1] - marks[0][1], marks[-1][2] - marks[0][2]))
            for name, wall, cpu in steps:
                step = "checking the old bundle" if name == "start" else name
                print(f"| {size} | {parameters:,} | {step} | {wall:.2f} | {cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()
