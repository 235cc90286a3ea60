"""How far off is what `bench` and `plan` predict of a CPU? Hit and miss of the reference model, predicted and measured.

    python benchmarks/predicted.py --out benchmarks/results/NAME.json [--widths 64,128,256,512]

For each width a model with random weights is exported, this processor's rates are measured, then requests of a few
sizes through `Session`. One thread, and the processor's time instead of the clock's, which does not count the turns of
whatever else the machine does; medians of a few runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from outcome import tell

from stca import probe
from stca.bundle import Bundle
from stca.checks.ceilings import measure_ceilings
from stca.checks.forecast import forecast
from stca.checks.timing import machine
from stca.export.pipeline import export_checkpoint
from stca.export.reference.checkpoint import Checkpoint
from stca.export.reference.config import Field, StcaConfig
from stca.export.reference.module import Stca
from stca.runtime import Request, Session

SIZES = ((512, 32), (2048, 300), (10_000, 32), (10_000, 300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=lambda s: [int(n) for n in s.split(",")], default=[64, 128, 256, 512])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in args.widths:
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(exported(width, Path(folder)), width)
    worst = max(abs(row[f"{stage}_ratio"] - 1) for row in rows for stage in ("hit", "miss"))
    tell({"machine": machine(1), "layers": 4, "rows": rows, "worst": round(worst, 3)}, args.out)


def exported(width: int, folder: Path) -> Bundle:
    """Four layers, in the form that the cost model takes for many targets."""
    torch.manual_seed(0)
    category = Field("category", 100)
    config = StcaConfig(
        items=10_000,
        tasks=("finish", "like"),
        history_fields=(Field("action", 4), category),
        user_fields=(Field("segment", 8),),
        target_fields=(category,),
        width=width,
        heads=max(4, width // 32),
    )
    model = Checkpoint(config, Stca(config).state_dict())
    return export_checkpoint(model, folder / "bundle", form="projected", prove=lambda *_: {})


def measured(bundle: Bundle, width: int) -> list[dict[str, Any]]:
    """One row for each size: milliseconds, predicted ones, and their ratio."""
    session = Session.load(bundle.path, threads=1, cache_bytes=1 << 40)
    floor = times(session, 1, 1, 20)
    stages = {"miss": floor[0], "hit": floor[1], "user_encoder": floor[0] - floor[1], "target_scorer": floor[1]}
    ceilings = measure_ceilings(bundle, stages, 1, clock=time.process_time)
    rows = []
    for history, targets in SIZES:
        found = dict(zip(("miss", "hit"), times(session, history, targets, 6), strict=True))
        expected = forecast(bundle, ceilings, history, targets).milliseconds()
        row: dict[str, Any] = {"width": width, "history": history, "targets": targets}
        for stage, seconds in found.items():
            row |= {f"{stage}_ms": round(1e3 * seconds, 3), f"{stage}_predicted_ms": round(expected[stage], 3)}
            row[f"{stage}_ratio"] = round(expected[stage] / (1e3 * seconds), 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def times(session: Session, history: int, targets: int, runs: int) -> tuple[float, float]:
    """Processor seconds of a miss and of a hit."""
    specs = session.manifest.graphs["request"].inputs
    inputs = probe.single(specs, history, targets, np.random.default_rng(0))
    request = Request(inputs, user="user", version=0)
    found: list[list[float]] = [[], []]
    for _ in range(runs):
        session.forget("user")
        for times in found:
            start = time.process_time()
            session.score(request)
            times.append(time.process_time() - start)
    miss, hit = (statistics.median(each[1:]) for each in found)
    return miss, hit


if __name__ == "__main__":
    main()
