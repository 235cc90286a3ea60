"""What a calibration kept in 8 bits, what each tensor costs alone, and what was tried: from a bundle's manifest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from stca.report import charts
from stca.report.charts import Bar, Panel, Point, Series
from stca.report.formats import Row, Table, byte_count, digits, number, share, whole

# Verdicts: colours and words.
_SAID: Final[Mapping[str, tuple[str, str]]] = {
    "holds": ("good", "holds"),
    "undecided": ("request", "undecided"),
    "broken": ("bad", "over"),
}
_MOST_BARS: Final = 12


def charts_of(told: Row) -> list[tuple[Markup, str]]:
    """Each chart with what is said below it; none where all tensors went to 8 bits at once, or are not told of."""
    parts: Sequence[Row] = told.get("parts", ())
    if not parts:
        return []
    worst = sorted(parts, key=lambda p: -p["rms"])[:_MOST_BARS]
    high = set(told["tried"][-1]["high"])
    bars = tuple(Bar(p["name"], (("other" if p["name"] in high else "user", p["rms"]),), p["rms"]) for p in worst)
    more = f" The {len(worst)} of {len(parts)} that move scores most." if len(worst) < len(parts) else ""
    key = '<span class="key user"></span>in 8 bits <span class="key other"></span>kept as it was.'
    return [
        (
            _front(told),
            "Each point was measured on the whole trace. Bytes are of a user’s state and of the weights. "
            "The dotted line adds up what each tensor costs alone.",
        ),
        (
            charts.bars("Error of each tensor alone", bars, digits, "root mean square error of a score"),
            Markup(key) + more,
        ),
    ]


def _front(told: Row) -> Markup:
    """Bytes against error: what was measured, and what the parts' own errors add up to."""
    before = told["float32_bytes"]
    saved = itertools.accumulate(p["saved"] for p in told["parts"])
    squares = itertools.accumulate(p["rms"] ** 2 for p in told["parts"])
    expected = [Point(100 * (1 - s / before), math.sqrt(e)) for s, e in zip(saved, squares, strict=True) if e > 0]
    series = [Series("added up", "other", tuple(reversed(expected)), dashed=True)]
    for verdict, (role, word) in _SAID.items():
        of = [t for t in told["tried"] if t["verdict"] == verdict and t["rms"] > 0]
        points = tuple(sorted((Point(100 * t["bytes"] / before, t["rms"]) for t in of), key=lambda p: p.x))
        series += [Series(word, role, points)] if points else []
    return charts.lines(
        "Bytes against error",
        (Panel("Error of all tensors together", tuple(s for s in series if s.points)),),
        show=lambda v: digits(v, 2),
        x_label="bytes kept, % of float32’s",
        y_label="error of a score",
    )


def tables_of(told: Row) -> list[Table]:
    """What was tried, and each tensor alone."""
    tried = sorted(told.get("tried", ()), key=lambda t: -len(t["quantized"]))
    measures = [m["name"] for m in tried[0]["measures"]] if tried else []
    rows = [
        (
            number(len(t["quantized"]), whole),
            number(t["ratio"], share),
            number(t["weights_ratio"], share),
            number(t["rms"], digits),
            *(
                number(m["estimate"]["value"], lambda v: f"{v:+.5f}" if abs(v) < 0.1 else f"{v:.4f}")
                for m in t["measures"]
            ),
            _SAID[t["verdict"]][1],
        )
        for t in tried
    ]
    headings = ("tensors in 8 bits", "state, of float32’s", "weights, of float32’s", "error", *measures, "budget")
    made = [Table("What was tried", headings, rows, "nnnn" + "n" * len(measures) + "-")] if rows else []
    high = set(told["tried"][-1]["high"]) if tried else set()
    alone = [
        (
            p["name"],
            p["node"],
            number(p["rms"], digits),
            number(p["saved"], byte_count),
            "as it was" if p["name"] in high else "8 bits",
        )
        for p in told.get("parts", ())
    ]
    if alone:
        made.append(Table("Each tensor alone", ("tensor", "node", "error", "saves", "kept in"), alone, "c-nn-"))
    return made


def summary(told: Mapping[str, Any]) -> str | None:
    """What the budget was, as a sentence; None where no calibration under a budget is told of."""
    if "budget" not in told or not told.get("tried"):
        return None
    auc, top = told["budget"]["auc"], told["budget"]["top"]
    bounds = [f"AUC may change by {auc:g}"] if auc is not None else []
    bounds += [f"of the best {k} targets {100 * x:g} % must stay" for k, x in top.items()]
    taken = told["tried"][-1]
    many, of = len(taken["quantized"]), len(taken["quantized"]) + len(taken["high"])
    return f"{many} of {of} tensors are in 8 bits. On {told['requests']} recorded requests, {' and '.join(bounds)}."
