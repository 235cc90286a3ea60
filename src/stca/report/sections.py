"""The parts of the report: the cut, parity, latency and accuracy, each as a picture, words and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stca.bundle import Manifest
from stca.report.blocks import LABELS, Condensed
from stca.report.charts import Bar, Limit, Point, Series, limit_chart, line_chart, stacked_bars
from stca.report.markup import (
    Markup,
    byte_count,
    details,
    digits,
    el,
    flop_count,
    milliseconds,
    number,
    scroll,
    share,
    table,
    terms,
    times,
    whole,
)
from stca.report.picture import block_picture

Row = Mapping[str, Any]

STAGES: Mapping[str, tuple[str, str]] = {
    "torch": ("PyTorch", "the trained model itself, in the precision it is served in"),
    "request_graph": ("request graph", "the whole model as one ONNX file"),
    "joined_halves": ("joined halves", "user encoder, then target scorer"),
    "session": ("session", "the way production calls it, computed anew and from a kept state"),
}
WAYS: Mapping[str, tuple[str, str]] = {
    "pointwise": (
        "other",
        "the baseline: each candidate is a request of its own, and reads the whole history again",
    ),
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


# The graph and its cut.


def cut(manifest: Manifest, graph: Condensed) -> list[Markup | None]:
    """The picture of the graph, what the split had to say, and tables of state, blocks and inputs."""
    split = manifest.split
    space = "\N{NO-BREAK SPACE}"
    nominal = ", ".join(f"{name}{space}={space}{whole(size)}" for name, size in split["workload"].items())
    joined = "New events can be appended to a kept state without reading the old ones again: shown exact at export."
    told = [
        *([("user", joined)] if manifest.appendable else ()),
        *(("request", d["text"]) for d in split.get("request_dependencies", ())),
        *(("other", note) for note in split.get("notes", ())),
    ]
    return [
        el(
            "p",
            "The cut is not drawn by hand. It follows the data: what depends on the user alone can be kept, and among ",
            "all the places to cut, a minimum cut takes the one where the fewest bytes cross for the work they save.",
        ),
        el(
            "figure",
            scroll(block_picture(graph), "The two graphs and their cut"),
            el(
                "figcaption",
                "Each block stands for many nodes of the graphs. The stronger its colour, and the longer the bar at ",
                "its foot, the more of the work it does. Pills are the tensors that cross the cut; a dashed one is an ",
                "input stored as it came. Purple is done once per request. Offsets and lengths, which go everywhere, ",
                f"are not drawn. Work is counted from shapes, not timed, for a request with {nominal}.",
            ),
        ),
        *(el("p", words, class_=f"notice {kind}") for kind, words in told),
        details("User state", _state(manifest, graph), is_open=True),
        details("Blocks and their work", _blocks(graph)),
        details("Inputs and their scope", _inputs(manifest)),
    ]


def _state(manifest: Manifest, graph: Condensed) -> Markup:
    rows = [
        (
            el("code", s.name),
            el("code", s.about),
            number(s.bytes_per_token, byte_count) if s.bytes_per_token else "–",
            number(s.bytes, byte_count),
            f"input {spec.input}, as it came" if spec.input else "computed",
        )
        for s, spec in zip(graph.state, manifest.state, strict=True)
    ]
    headings = ("tensor", "type and shape", "per event", "in all", "what it is")
    return table(headings, rows, caption="User state", numeric="--nn-")


def _blocks(graph: Condensed) -> Markup:
    rows = [
        (
            LABELS[b.kind] + (f", {graph.row_name(b.row)}" if b.row else ""),
            "user encoder" if b.side == "user" else "target scorer",
            str(b.scope),
            number(sum(b.operators.values()), whole),
            number(b.flops, flop_count),
            number(b.flops / max(1, graph.flops), share),
            ", ".join(f"{n} {op}" for op, n in list(b.operators.items())[:6]),
        )
        for b in graph.blocks
    ]
    headings = ("block", "half", "scope", "nodes", "work", "share", "operators")
    return table(headings, rows, caption="Blocks of the picture", numeric="---nnn-")


def _inputs(manifest: Manifest) -> Markup:
    rows = [
        (el("code", i.name), i.scope, i.dtype, f"[{', '.join(map(str, i.shape))}]", number(i.limit, whole))
        for i in manifest.graphs["request"].inputs
    ]
    headings = ("input", "scope", "type", "shape", "ids below")
    return table(headings, rows, caption="Inputs of the model", numeric="----n")


# Parity.


def parity(report: Row) -> list[Markup]:
    """Every stage's error beside its limit."""
    stages: Sequence[Row] = report["stages"]
    # The first stage is the yardstick: it sets the limit of the others, and has only to be near itself.
    limits = [
        Limit(_stage(s), s["max_abs"], s["limit"] if i else None, s["passed"], "the yardstick")
        for i, s in enumerate(stages)
    ]
    about = "; ".join(
        f"{r.label}: error {digits(r.value)}" + (f", limit {digits(r.limit)}" if r.limit is not None else "")
        for r in limits
    )
    chart = limit_chart("Error of each stage", about, limits, "largest absolute error of a score (left is better)")
    rows = [
        (
            _stage(s),
            number(s["max_abs"], digits),
            number(s["limit"], digits),
            number(s["max_rel"], digits),
            number(s["cosine"], lambda v: digits(max(0.0, 1 - v), 2)),
            number(s["topk_overlap"], lambda v: f"{v:.3f}"),
            el("span", "passed", class_="ok") if s["passed"] else el("span", "failed", class_="no"),
        )
        for s in stages
    ]
    headings = ("stage", "largest error", "limit", "largest relative error", "1 − cosine", "top-k overlap", "verdict")
    return [
        el(
            "p",
            "Every step from the trained model to the serving session is asked the same random requests, empty ",
            f"histories among them, and its scores are held against a reference ({report['reference']}). The first ",
            "step is the yardstick: the others may be off by twice what it loses to rounding, plus a few roundings. ",
            "And the ten best candidates must stay the ten best, which is an overlap of 1.",
        ),
        el(
            "figure",
            scroll(chart, "Error of each stage"),
            el("figcaption", "Dots: the largest error found. Bars: what is allowed. The axis is logarithmic."),
        ),
        terms(("", *STAGES[s["name"]]) for s in stages if s["name"] in STAGES),
        details("Parity in numbers", table(headings, rows, caption="Parity", numeric="-nnnnn-"), is_open=True),
    ]


def _stage(stage: Row) -> str:
    return STAGES.get(stage["name"], (str(stage["name"]),))[0]


# Latency.


def latency(bench: Row) -> list[Markup | None]:
    """Hit, miss and pointwise against the history's length, and where the time of a miss goes."""
    rows = by_size(bench["rows"])
    counts = sorted({r["targets"] for r in rows})
    drawn = counts if len(counts) <= 3 else [counts[0], counts[len(counts) // 2], counts[-1]]
    caption = "Median time of a request, both axes logarithmic; the whisker reaches the 95th percentile."
    if some := sorted({measured(r) for r in rows if is_scaled(r)}):
        caption += (
            f" Hollow points were measured on {' or '.join(map(whole, some))} candidates and scaled up to the number "
            "shown: the pointwise cost is the same for each candidate."
        )
    return [
        el("p", "Ways to answer the same request, measured in one run on one machine."),
        terms((kind, name, says) for name, (kind, says) in WAYS.items() if any(r["stage"] == name for r in rows)),
        el(
            "figure",
            el("div", [_latency_panel(rows, m) for m in drawn], class_="panels"),
            el("figcaption", caption),
        ),
        _halves(rows, counts),
        details("What it buys: ratios of medians", _ratios(bench["ratios"]), is_open=True)
        if bench.get("ratios")
        else None,
        details("Every latency measured", _latencies(rows)),
    ]


def _latency_panel(rows: Sequence[Row], targets: int) -> Markup | None:
    series = []
    for stage in WAYS:
        points = [
            Point(r["history"], r["p50_ms"], r["p95_ms"], hollow=is_scaled(r))
            for r in rows
            if (r["stage"], r["targets"]) == (stage, targets) and finite(r["p50_ms"])
        ]
        if points:
            series.append(Series(stage, stage, tuple(points)))
    if not series:
        return None
    name = f"{_candidates(targets)} per request"
    about = "; ".join(
        f"{s.label}: " + ", ".join(f"{milliseconds(p.y)} at {whole(p.x)} events" for p in s.points) for s in series
    )
    chart = line_chart(
        f"Latency, {name}",
        about,
        series,
        show=milliseconds,
        x_label="events in the history",
        y_label="time of a request",
    )
    return el("div", el("h3", name), chart)


def _halves(rows: Sequence[Row], counts: Sequence[int]) -> Markup | None:
    """The two halves' medians by size: all sizes where they are few, else those of the most targets."""
    at = {(r["targets"], r["history"], r["stage"]): r["p50_ms"] for r in rows}
    sizes = sorted((m, n) for m, n, stage in at if stage == "user_encoder" and (m, n, "target_scorer") in at)
    if not sizes:
        return None
    bars = [
        Bar(
            _candidates(m),
            f"{whole(n)} events",
            (
                ("user", "user encoder", at[m, n, "user_encoder"]),
                ("target", "target scorer", at[m, n, "target_scorer"]),
            ),
        )
        for m, n in sizes
        if len(sizes) <= 12 or m == counts[-1]
    ]
    about = "; ".join(
        f"{b.group}, {b.label}: " + ", ".join(f"{n} {milliseconds(v)}" for _, n, v in b.segments) for b in bars
    )
    x_label = "median time of the two halves alone, one after the other"
    return el(
        "figure",
        el("h3", "Where the time of a miss goes"),
        scroll(stacked_bars("Time of each half", about, bars, milliseconds, x_label), "Time of each half"),
        el(
            "figcaption",
            (el("span", class_="key user"), "user encoder ", el("span", class_="key target"), "target scorer. "),
            "A hit saves the first part.",
        ),
    )


def _ratios(ratios: Sequence[Row]) -> Markup:
    names = list(dict.fromkeys(k for r in ratios for k in r if k not in ("history", "targets")))
    words = {"pointwise_over_miss": "pointwise ÷ miss", "miss_over_hit": "miss ÷ hit"}
    rows = [
        (*(number(r[k], whole) for k in ("history", "targets")), *(number(r.get(k), times) for k in names))
        for r in by_size(ratios)
    ]
    headings = ("history", "targets", *(words.get(n, n.replace("_", " ")) for n in names))
    return table(headings, rows, caption="Ratios of medians", numeric="n" * len(headings))


def _latencies(rows: Sequence[Row]) -> Markup:
    cells = [
        (
            number(r["history"], whole),
            number(r["targets"], whole),
            r["stage"].replace("_", " "),
            *(number(r[t], milliseconds) for t in ("p50_ms", "p95_ms", "p99_ms")),
            number(r["runs"], whole),
            f"scaled from {measured(r)} targets" if is_scaled(r) else "",
        )
        for r in rows
    ]
    headings = ("history", "targets", "stage", "p50", "p95", "p99", "runs", "")
    return table(headings, cells, caption="Latency of each stage", numeric="nn-nnnn-")


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
    """The size of a request in words."""
    return f"{_candidates(row['targets'])}, {whole(row['history'])} events"


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


# Accuracy.


def accuracy(auc: Sequence[Row], trained: int | None) -> list[Markup]:
    """AUC against the history's length, one panel for each task."""
    rows = sorted(auc, key=lambda r: r["history"])
    references = list(dict.fromkeys(k for r in rows for k in r if k not in ("history", "task", "auc")))
    boundary = (
        f" In training the model saw at most {whole(trained)} events: what lies to the right of the line is longer "
        "than anything it learned from."
        if trained
        else ""
    )

    def shown(value: float) -> str:
        return f"{value:.4f}"

    tasks = list(dict.fromkeys(r["task"] for r in rows))
    cells = [
        (
            r["task"],
            number(r["history"], whole),
            number(r["auc"], shown),
            *(number(r.get(k), shown) for k in references),
        )
        for task in tasks
        for r in rows
        if r["task"] == task
    ]
    headings = ("task", "history", "AUC", *(_reference(k) for k in references))
    return [
        el(
            "p",
            "AUC is the chance that the model ranks something a person liked above something they did not: 0.5 is a ",
            f"coin toss, 1 is perfect.{boundary}",
        ),
        el(
            "figure",
            el(
                "div",
                [_accuracy_panel(rows, t, references, trained) for t in tasks],
                class_="panels",
            ),
        ),
        terms(("other", *REFERENCES[k]) for k in references if k in REFERENCES),
        details(
            "AUC in numbers", table(headings, cells, caption="AUC", numeric="-" + "n" * len(headings)), is_open=True
        ),
    ]


def _reference(name: str) -> str:
    return REFERENCES.get(name, (name.replace("_", " "),))[0]


def _accuracy_panel(rows: Sequence[Row], task: str, references: Sequence[str], trained: int | None) -> Markup | None:
    def points(key: str) -> tuple[Point, ...]:
        return tuple(Point(r["history"], r[key]) for r in rows if r["task"] == task and finite(r.get(key)))

    lines = [Series("model", "auc", points("auc"), named=True)]
    lines += [Series(_reference(k), "best" if k.startswith("best") else "reference", points(k)) for k in references]
    series = [s for s in lines if s.points]
    if not series:
        return None
    about = "; ".join(f"{s.label}: " + ", ".join(f"{p.y:.4f} at {whole(p.x)}" for p in s.points) for s in series)
    chart = line_chart(
        f"AUC of {task}",
        about,
        series,
        show=lambda v: f"{v:.3f}",
        log_y=False,
        x_label="events in the history",
        y_label="AUC",
        trained=trained,
    )
    return el("div", el("h3", task), chart)
