"""The page's part on latency: the ways to answer a request, at each size, and what is inside a miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from stca.report import charts
from stca.report.charts import Bar, Panel, Point, Series
from stca.report.formats import Row, Table, finite, milliseconds, number, times, whole

WAYS: Mapping[str, tuple[str, str]] = {
    "pointwise": ("other", "the baseline: each candidate is a request of its own, and reads the whole history again"),
    "miss": ("user", "nothing is kept yet: the history is read once, then all candidates are scored against it"),
    "hit": ("target", "the user’s state is there from an earlier request: only the candidates are scored"),
}
_MOST_PANELS, _MOST_BARS = 3, 12


def charts_of(bench: Row) -> list[tuple[str, Markup, str]]:
    """(heading, chart, caption): the ways to answer a request, and what is inside a miss."""
    rows = by_size(bench["rows"])
    counts = sorted({r["targets"] for r in rows})
    drawn = counts if len(counts) <= _MOST_PANELS else [counts[0], counts[len(counts) // 2], counts[-1]]
    panels = [Panel(f"{_candidates(m)} per request", series) for m in drawn if (series := _ways(rows, m))]
    caption = "Median time of a request, both axes logarithmic; the whisker reaches the 95th percentile."
    if some := sorted({measured(r) for r in rows if is_scaled(r)}):
        caption += (
            f" Hollow points were measured on {' or '.join(map(whole, some))} candidates and scaled up to the number "
            "shown: the pointwise cost is the same for each candidate."
        )
    found = []
    if panels:
        chart = charts.lines(
            "Latency", tuple(panels), show=milliseconds, x_label="events in the history", y_label="time of a request"
        )
        found.append(("", chart, caption))
    if inside := _inside_a_miss(rows, counts):
        found.append(("What is inside a miss", *inside))
    return found


def _ways(rows: Sequence[Row], targets: int) -> tuple[Series, ...]:
    found = []
    for stage, (role, _) in WAYS.items():
        points = tuple(
            Point(r["history"], r["p50_ms"], r["p95_ms"], hollow=is_scaled(r))
            for r in rows
            if (r["stage"], r["targets"]) == (stage, targets) and finite(r["p50_ms"])
        )
        if points:
            found.append(Series(stage, role, points, dashed=stage == "pointwise"))
    return tuple(found)


def _inside_a_miss(rows: Sequence[Row], counts: Sequence[int]) -> tuple[Markup, str] | None:
    """The miss as it was measured, and in it the user encoder's share and the target scorer's time in a hit."""
    at = {(r["targets"], r["history"], r["stage"]): r["p50_ms"] for r in rows}
    sizes = sorted(
        (m, n) for m, n, stage in at if stage == "miss" and {(m, n, "user_encoder"), (m, n, "target_scorer")} <= set(at)
    )
    if len(sizes) > _MOST_BARS:
        sizes = [(m, n) for m, n in sizes if m == counts[-1]]
    if not sizes:
        return None
    drawn, longer = [], False
    for m, n in sizes:
        miss, encoder, scorer = (at[m, n, stage] for stage in ("miss", "user_encoder", "target_scorer"))
        rest = miss - encoder - scorer
        longer |= rest < 0
        segments = [("user", encoder), ("target", scorer), *([("other", rest)] if rest > 0 else [])]
        drawn.append(Bar(f"{_candidates(m)}, {whole(n)} events", tuple(segments), miss))
    caption = (
        "The line ends the median of a miss; the target scorer's part was measured in a hit, which saves the rest."
    )
    if longer:
        caption += " Where a bar passes its line, the target scorer took longer in the hit than in the miss: noise."
    return charts.bars("What is inside a miss", tuple(drawn), milliseconds, "median time"), caption


def of_first_engine(bench: Row) -> Row:
    """The rows of the engine that was named first, with the baseline: what charts and ratios are of."""
    first = next((r.get("engine") for r in bench["rows"] if r["stage"] != "pointwise"), None)
    rows = [r for r in bench["rows"] if r.get("engine") == first or r["stage"] == "pointwise"]
    ratios = [
        {k: x for k, x in r.items() if k != "engine"} for r in bench.get("ratios", ()) if r.get("engine") == first
    ]
    return {**bench, "rows": rows, "ratios": ratios}


def engine_tables(bench: Row) -> list[Table]:
    """Where several engines were asked for: each one's hit and miss side by side, and why one could not run."""
    engines = list(dict.fromkeys(r["engine"] for r in bench["rows"] if "engine" in r and r["stage"] != "pointwise"))
    absent = dict(bench.get("absent") or {})
    if len(engines) + len(absent) < 2:
        return []
    at = {(r["history"], r["targets"], r["stage"], r["engine"]): r["p50_ms"] for r in bench["rows"]}
    sizes = sorted({(n, m) for n, m, *_ in at})
    rows: list[Sequence[object]] = [
        (number(n, whole), number(m, whole), stage, *(number(at.get((n, m, stage, e)), milliseconds) for e in engines))
        for n, m in sizes
        for stage in ("hit", "miss")
    ]
    headings = ("history", "targets", "median of a", *engines)
    table = Table("Engines side by side", headings, rows, "nn-" + "n" * len(engines))
    names = [
        *((e, f"{run['user_encoder']}; {run['target_scorer']}") for e, run in (bench.get("measured") or {}).items()),
        *((e, f"not measured: {why}") for e, why in absent.items()),
    ]
    return [table, Table("The engines", ("engine", "what ran, or why not"), names, "--")]


def tables_of(bench: Row) -> list[Table]:
    """Ratios of medians, and every time measured."""
    names = list(dict.fromkeys(k for r in bench.get("ratios", ()) for k in r if k not in ("history", "targets")))
    words = {"pointwise_over_miss": "pointwise ÷ miss", "miss_over_hit": "miss ÷ hit"}
    ratios = [
        (*(number(r[k], whole) for k in ("history", "targets")), *(number(r.get(k), times) for k in names))
        for r in by_size(bench.get("ratios", ()))
    ]
    headings = ("history", "targets", *(words.get(n, n.replace("_", " ")) for n in names))
    rows = [
        (
            number(r["history"], whole),
            number(r["targets"], whole),
            r["stage"].replace("_", " "),
            *(number(r[t], milliseconds) for t in ("p50_ms", "p95_ms", "p99_ms")),
            number(r["runs"], whole),
            f"scaled from {measured(r)} targets" if is_scaled(r) else "",
        )
        for r in by_size(bench["rows"])
    ]
    every = ("history", "targets", "stage", "p50", "p95", "p99", "runs", "")
    return [
        *([Table("Ratios of medians", headings, ratios, "n" * len(headings))] if ratios else ()),
        Table("Latency of each stage", every, rows, "nn-nnnn-"),
    ]


def measured(row: Row) -> int:
    """Targets that were run for this row's times."""
    return int(row.get("measured_targets") or row["targets"])


def is_scaled(row: Row) -> bool:
    """Whether its times were scaled up from fewer targets."""
    return measured(row) < int(row["targets"])


def _candidates(count: int) -> str:
    return f"{whole(count)} candidate{'' if count == 1 else 's'}"


def by_size(rows: Iterable[Row]) -> list[Row]:
    """By history, then by targets; the order within a size stays."""
    return sorted(rows, key=lambda r: (r["history"], r["targets"]))


def size_of(row: Row) -> str:
    return f"{_candidates(row['targets'])}, {whole(row['history'])} events"


def baseline_targets(rows: Sequence[Row], size: Row) -> int | None:
    """How many targets the baseline of this size was measured on, when that is not all of them."""
    same = (r for r in rows if all(r[k] == size[k] for k in ("history", "targets")))
    return next((measured(r) for r in same if r["stage"] == "pointwise" and is_scaled(r)), None)
