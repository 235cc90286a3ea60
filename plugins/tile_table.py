"""The measured table that overrules the cost model, as `benchmarks/attention.py --tune` writes it."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stca.plugins import tiling
from stca.plugins.tiling import Plan, Shape, Sizes, Tile


def record(path: Path, sm: int, shape: Shape, sizes: Sizes, plan: Plan) -> None:
    """Put one measured plan into the table at `path`: other rows stay, one of the same SM, shape and sizes is replaced.

    Args:
        path: the table; made when it is not there, and never seen half written.
        sm: compute capability of the GPU it was measured on.
        shape: what was compiled in.
        sizes: of the launch; rounded here.
        plan: with the seconds it took.
    """
    plans = {**read_plans(path), (sm, shape, tiling.rounded(sizes)): plan}
    rows: list[dict[str, Any]] = []
    for (of_sm, of_shape, of_sizes), of in plans.items():
        key = {"sm": of_sm, "shape": asdict(of_shape), "sizes": asdict(of_sizes)}
        rows.append({**key, "tile": asdict(of.tile), "parts": of.parts, "seconds": of.seconds})
    rows.sort(key=lambda row: [row["sm"], *row["shape"].values(), *row["sizes"].values()])
    new = path.with_name(f".{path.name}.new")
    new.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    new.replace(path)


@functools.cache
def measured_plans(path: Path) -> dict[tuple[int, Shape, Sizes], Plan]:
    """The table written by `benchmarks/attention.py --tune`; empty where nobody has measured.

    A JSON list of objects with `sm`, `shape`, `sizes`, `tile` (the fields of those classes), `parts` and `seconds`.
    """
    return read_plans(path)


def read_plans(path: Path) -> dict[tuple[int, Shape, Sizes], Plan]:
    """The table at `path` as it is now; empty where there is none."""
    if not path.exists():
        return {}
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return {
        (row["sm"], Shape(**row["shape"]), Sizes(**row["sizes"])): Plan(
            Tile(**row["tile"]), row["parts"], row["seconds"], measured=True
        )
        for row in rows
    }
