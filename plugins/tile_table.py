"""The measured table that overrules the cost model, as `benchmarks/attention.py --tune` writes it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stca.plugins import tiling
from stca.plugins.tiling import Plan, Shape, Sizes


def record(path: Path, sm: int, shape: Shape, sizes: Sizes, plan: Plan) -> None:
    """Put one measured plan into the table at `path`: other rows stay, one of the same SM, shape and sizes is replaced.

    Args:
        path: the table; made when it is not there, and never seen half written.
        sm: compute capability of the GPU it was measured on.
        shape: what was compiled in.
        sizes: of the launch; rounded here.
        plan: with the seconds it took.
    """
    plans = {**tiling.read_plans(path), (sm, shape, tiling.rounded(sizes)): plan}
    rows: list[dict[str, Any]] = []
    for (of_sm, of_shape, of_sizes), of in plans.items():
        key = {"sm": of_sm, "shape": asdict(of_shape), "sizes": asdict(of_sizes)}
        rows.append({**key, "tile": asdict(of.tile), "parts": of.parts, "seconds": of.seconds})
    rows.sort(key=lambda row: [row["sm"], *row["shape"].values(), *row["sizes"].values()])
    new = path.with_name(f".{path.name}.new")
    new.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    new.replace(path)
