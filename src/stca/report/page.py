"""What the page's template shows, made from the data: words, tables and charts of each part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stca.manifest import Manifest
from stca.report import charts
from stca.report.blocks import LABELS, Block, Condensed
from stca.report.charts import Limit, Panel, Point, Series
from stca.report.formats import (
    Row,
    Table,
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
from stca.report.latency import baseline_targets, by_size, size_of

STAGES: Mapping[str, tuple[str, str]] = {
    "torch": ("PyTorch", "the trained model itself, in the precision it is served in"),
    "request_graph": ("request graph", "the whole model as one ONNX file"),
    "joined_halves": ("joined halves", "user encoder, then target scorer"),
    "session": ("session", "the way production calls it, computed anew and from a kept state"),
    "pieces": ("pieces", "a session that reads the history as several users' states, each where it lies"),
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
            size = size_of(told[-1])
            if name == "pointwise_over_miss" and (k := baseline_targets(bench["rows"], told[-1])):
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
        found.append((number(hits[-1]["p50_ms"], milliseconds), f"median time of a hit ({size_of(hits[-1])})"))
    return found[:4]


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
