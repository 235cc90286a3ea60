"""What the page's template shows, made from the data: words, tables and charts of each part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from stca.manifest import Manifest
from stca.report import charts
from stca.report.blocks import LABELS, Block, Condensed
from stca.report.charts import Bar, Limit, Panel, Point, Series
from stca.report.formats import (
    auc,
    byte_count,
    digits,
    finite,
    flop_count,
    milliseconds,
    number,
    share,
    times,
    whole,
)

Row = Mapping[str, Any]

STAGES: Mapping[str, tuple[str, str]] = {
    "torch": ("PyTorch", "the trained model itself, in the precision it is served in"),
    "request_graph": ("request graph", "the whole model as one ONNX file"),
    "joined_halves": ("joined halves", "user encoder, then target scorer"),
    "session": ("session", "the way production calls it, computed anew and from a kept state"),
}
WAYS: Mapping[str, tuple[str, str]] = {
    "pointwise": ("other", "the baseline: each candidate is a request of its own, and reads the whole history again"),
    "miss": ("user", "nothing is kept yet: the history is read once, then all candidates are scored against it"),
    "hit": ("target", "the user’s state is there from an earlier request: only the candidates are scored"),
}
REFERENCES: Mapping[str, tuple[str, str]] = {
    "best": ("best possible", "the true probability of each outcome, given this much history: no model can do better"),
    "best_possible": ("best possible", "what no model can do better than, given this much history"),
    "limit": ("endless history", "the best possible with an endless history"),
    "no_history": ("no history", "the best possible of a model that sees no history at all"),
    "popularity": ("popularity", "ranking by how often an item occurs"),
    "item_rate": ("item rate", "ranking by how often an item was liked"),
    "item_and_user_rate": ("item + user rate", "ranking by how often the item, and this user, liked before"),
}
_MOST_PANELS, _MOST_BARS = 3, 12


@dataclass(frozen=True)
class Table:
    """A table. `kinds` has a letter for each column: `n` of numbers, `c` of code, anything else of words."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    kinds: str


# The headline.


def headline(parity: Row | None, bench: Row | None, rows: Sequence[Row], trained: int | None) -> list[tuple[Any, str]]:
    """At most four measured numbers and what they are, the most telling first."""
    found: list[tuple[Any, str]] = []
    bench = {"rows": (), "ratios": (), **(bench or {})}
    for name, words in (
        ("pointwise_over_miss", "as fast as scoring each candidate on its own"),
        ("miss_over_hit", "as fast again when the user’s state was kept"),
    ):
        if told := [r for r in by_size(bench["ratios"]) if finite(r.get(name))]:
            size = _size_of(told[-1])
            if name == "pointwise_over_miss" and (k := _baseline_targets(bench["rows"], told[-1])):
                size += f"; baseline scaled from {whole(k)}"
            found.append((number(told[-1][name], times), f"{words} ({size})"))
    if checked := list((parity or {"stages": ()})["stages"])[1:]:
        worst = max(checked, key=lambda s: (not finite(s["max_abs"]), s["max_abs"]))
        found.append((number(worst["max_abs"], digits), "largest difference of any score from the float64 reference"))
    if known := [r for r in rows if finite(r["auc"])]:
        longest = max(known, key=lambda r: r["history"])
        seen = f", trained on at most {whole(trained)}" if trained else ""
        found.append(
            (number(longest["auc"], auc), f"AUC of {longest['task']} at {whole(longest['history'])} events{seen}")
        )
    if hits := by_size(r for r in bench["rows"] if r["stage"] == "hit"):
        found.append((number(hits[-1]["p50_ms"], milliseconds), f"median time of a hit ({_size_of(hits[-1])})"))
    return found[:4]


def _baseline_targets(rows: Sequence[Row], size: Row) -> int | None:
    """How many targets the baseline of this size was measured on, when that is not all of them."""
    same = (r for r in rows if all(r[k] == size[k] for k in ("history", "targets")))
    return next((_measured(r) for r in same if r["stage"] == "pointwise" and _is_scaled(r)), None)


# The graph and its cut.


def graph_tables(manifest: Manifest, graph: Condensed) -> list[Table]:
    """The user state, the blocks of the picture, and the inputs."""
    state = [
        (
            s.name,
            s.about,
            number(s.bytes_per_token, byte_count) if s.bytes_per_token else "–",
            number(s.bytes, byte_count),
            f"input {spec.input}, as it came" if spec.input else "computed",
        )
        for s, spec in zip(graph.state, manifest.state, strict=True)
    ]
    blocks = [
        (
            block_name(b, graph),
            "user encoder" if b.side == "user" else "target scorer",
            str(b.scope),
            number(sum(b.operators.values()), whole),
            number(b.flops, flop_count),
            number(b.flops / max(1, graph.flops), share),
            ", ".join(f"{n} {op}" for op, n in list(b.operators.items())[:6]),
        )
        for b in graph.blocks
    ]
    inputs = [
        (i.name, i.scope, i.dtype, f"[{', '.join(map(str, i.shape))}]", number(i.limit, whole))
        for i in manifest.graphs["request"].inputs
    ]
    return [
        Table("User state", ("tensor", "type and shape", "per event", "in all", "what it is"), state, "ccnn-"),
        Table(
            "Blocks of the picture",
            ("block", "half", "scope", "nodes", "work", "share", "operators"),
            blocks,
            "---nnn-",
        ),
        Table("Inputs of the model", ("input", "scope", "type", "shape", "ids below"), inputs, "c---n"),
    ]


def block_name(block: Block, graph: Condensed) -> str:
    """`Attention, layer 2`."""
    return LABELS[block.kind] + (f", {graph.row_name(block.row)}" if block.row else "")


def in_order(graph: Condensed) -> list[Block]:
    """Blocks as data flows through them: what serves all layers, then layer by layer, then the head."""
    kinds = list(LABELS)  # which lists the query path after the attention that reads it
    return sorted(
        graph.blocks,
        key=lambda b: (b.kind == "head", b.row, b.kind == "attention", kinds.index(b.kind)),
    )


def notices(manifest: Manifest) -> list[tuple[str, str]]:
    """What the split had to say, as (role, words)."""
    joined = "New events can be appended to a kept state without reading the old ones again: shown exact at export."
    return [
        *([("user", joined)] if manifest.appendable else ()),
        *(("request", d["text"]) for d in manifest.split.get("request_dependencies", ())),
        *(("other", note) for note in manifest.split.get("notes", ())),
    ]


# Parity.


def parity_chart(report: Row) -> Markup:
    """Every stage's error beside its limit. The first is the yardstick: it sets the limit of the others."""
    rows = [
        Limit(_stage(s), s["max_abs"], s["limit"] if i else None, s["passed"], "the yardstick")
        for i, s in enumerate(report["stages"])
    ]
    return charts.limits("Error of each stage", tuple(rows), "largest absolute error of a score (left is better)")


def parity_table(report: Row) -> Table:
    """Every stage in numbers."""
    rows = [
        (
            _stage(s),
            number(s["max_abs"], digits),
            number(s["limit"], digits),
            number(s["max_rel"], digits),
            number(s["cosine"], lambda v: digits(max(0.0, 1 - v), 2)),
            number(s["topk_overlap"], lambda v: f"{v:.3f}"),
            Markup('<span class="{}">{}</span>').format(*(("ok", "passed") if s["passed"] else ("no", "failed"))),
        )
        for s in report["stages"]
    ]
    headings = ("stage", "largest error", "limit", "largest relative error", "1 − cosine", "top-k overlap", "verdict")
    return Table("Parity", headings, rows, "-nnnnn-")


def _stage(stage: Row) -> str:
    return _cut(STAGES.get(stage["name"], (str(stage["name"]),))[0])


# Latency.


def latency_charts(bench: Row) -> list[tuple[str, Markup, str]]:
    """(heading, chart, caption): the ways to answer a request, and what is inside a miss."""
    rows = by_size(bench["rows"])
    counts = sorted({r["targets"] for r in rows})
    drawn = counts if len(counts) <= _MOST_PANELS else [counts[0], counts[len(counts) // 2], counts[-1]]
    panels = [Panel(f"{_candidates(m)} per request", series) for m in drawn if (series := _ways(rows, m))]
    caption = "Median time of a request, both axes logarithmic; the whisker reaches the 95th percentile."
    if some := sorted({_measured(r) for r in rows if _is_scaled(r)}):
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
            Point(r["history"], r["p50_ms"], r["p95_ms"], hollow=_is_scaled(r))
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


def latency_tables(bench: Row) -> list[Table]:
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
            f"scaled from {_measured(r)} targets" if _is_scaled(r) else "",
        )
        for r in by_size(bench["rows"])
    ]
    every = ("history", "targets", "stage", "p50", "p95", "p99", "runs", "")
    return [
        *([Table("Ratios of medians", headings, ratios, "n" * len(headings))] if ratios else ()),
        Table("Latency of each stage", every, rows, "nn-nnnn-"),
    ]


def _measured(row: Row) -> int:
    """Targets that were run for this row's times."""
    return int(row.get("measured_targets") or row["targets"])


def _is_scaled(row: Row) -> bool:
    """Whether its times were scaled up from fewer targets."""
    return _measured(row) < int(row["targets"])


def _candidates(count: int) -> str:
    return f"{whole(count)} candidate{'' if count == 1 else 's'}"


def by_size(rows: Iterable[Row]) -> list[Row]:
    """By history, then by targets; the order within a size stays."""
    return sorted(rows, key=lambda r: (r["history"], r["targets"]))


def _size_of(row: Row) -> str:
    return f"{_candidates(row['targets'])}, {whole(row['history'])} events"


# Accuracy.


def accuracy(rows: Sequence[Row], trained: int | None) -> tuple[Markup | None, Table, list[tuple[str, str]]]:
    """AUC against the history's length: the chart, the table, and (reference, meaning)."""
    rows = sorted(rows, key=lambda r: r["history"])
    references = list(dict.fromkeys(k for r in rows for k in r if k not in ("history", "task", "auc")))
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    panels = [Panel(_cut(t), series) for t in tasks if (series := _task(rows, t, references))]
    chart = None
    if panels:
        ys = [p.y for panel in panels for s in panel.series for p in s.points]
        chart = charts.lines(
            "AUC",
            tuple(panels),
            show=_short,
            log_y=False,
            y_range=(min(0.5, min(ys) - 0.02), min(1.0, max(ys) + 0.04)),  # from a coin toss, for each task the same
            x_label="events in the history",
            y_label="AUC",
            trained=trained,
        )
    cells = [
        (r["task"], number(r["history"], whole), number(r["auc"], auc), *(number(r.get(k), auc) for k in references))
        for task in tasks
        for r in rows
        if r["task"] == task
    ]
    headings = ("task", "history", "AUC", *(_reference(k) for k in references))
    known = [REFERENCES[k] for k in references if k in REFERENCES]
    return chart, Table("AUC", headings, cells, "-" + "n" * (len(headings) - 1)), known


def _task(rows: Sequence[Row], task: str, references: Sequence[str]) -> tuple[Series, ...]:
    def points(key: str) -> tuple[Point, ...]:
        return tuple(Point(r["history"], r[key]) for r in rows if r["task"] == task and finite(r.get(key)))

    lines = [Series("model", "user", points("auc"), named=True)]
    lines += [Series(_cut(_reference(k)), "other", points(k), dashed=True) for k in references]
    return tuple(s for s in lines if s.points)


def _short(value: float) -> str:
    return f"{value:.3f}"


def _reference(name: str) -> str:
    return REFERENCES.get(name, (name.replace("_", " "),))[0]


def _cut(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


# How it was made.


def made_tables(manifest: Manifest, machine: Row, versions: Mapping[str, str]) -> list[Table]:
    """The machine, the versions that made the bundle and the figures, and the bundle's files."""
    names = [*versions, *(n for n in manifest.producer if n not in versions)]
    made = [(n, manifest.producer.get(n, "–"), versions.get(n, "–")) for n in names]
    files = [(n, number(f["bytes"], byte_count), f["sha256"]) for n, f in manifest.files.items()]
    files += [(t.file, number(t.bytes, byte_count), f"of its blocks, in {t.digests}") for t in manifest.tables or ()]
    return [
        Table("Machine", ("", ""), list(machine.items()), "--"),
        Table("Versions", ("", "made the bundle", "made the figures"), made, "---"),
        Table("Files", ("file", "size", "SHA-256"), files, "cnc"),
    ]


def code(sentence: str) -> Markup:
    """A sentence in which backticks enclose code."""
    parts = re.split("`", sentence)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
