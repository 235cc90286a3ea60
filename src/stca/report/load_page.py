"""The page about a load: how long requests took, what came of them, and both over time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from stca.report import charts, filled, put
from stca.report.charts import Bar, Panel, Point, Series
from stca.report.formats import Row, Table, finite, milliseconds, number, share, times, whole

# As `stca load --json` calls the runs of one page, and what people call them.
RUNS: Mapping[str, str] = {"load": "with states", "without_store": "without a store"}
_SCENARIOS: Mapping[str, str] = {
    "server": "This is what MLPerf calls the server scenario: each request is sent at a time of its own, drawn as a "
    "Poisson process, whatever became of those before it. Its latency counts from that moment on, so waiting counts.",
    "offline": "This is what MLPerf calls the offline scenario: all requests are there at once, and each is sent as "
    "soon as a connection is free. What counts is how many are answered in a second.",
}
_COUNTS: Mapping[str, str] = {
    "requests": "requests",
    "hits": "hits",
    "misses": "misses",
    "resent": "sent again with the history",
    "appended": "events appended",
    "not_appended": "events sent and not appended",
}
_LINES: Mapping[str, tuple[str, str]] = {
    "all": ("all", "ink"),
    "hits": ("hits", "target"),
    "misses": ("misses", "user"),
}


def write_load(
    path: str | os.PathLike[str],
    data: Row,
    *,
    commands: Sequence[str] = (),
    machine: Row | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the page.

    Args:
        path: the HTML file; an older one is replaced.
        data: what `stca load --json` prints.
        commands: what made this page.
        machine, versions: what the load came from.

    Raises:
        StcaError: when `path` cannot be written.
    """
    runs = {words: data[name] for name, words in RUNS.items() if name in data}
    first = data["load"]
    context = {
        "title": f"Load of {Path(str(data['target'])).name or data['target']}",
        "facts": [
            f"{first['scenario']} scenario",
            f"{whole(first['requests'])} requests",
            f"{first['seconds']:.0f} s",
            *([data["compared"]] if "compared" in data else []),
        ],
        "badge": _badge(first),
        "headline": _headline(first, data.get("without_store")),
        "scenario": _SCENARIOS[first["scenario"]],
        "percentiles": _percentiles(runs),
        "latency_table": _latency_table(runs),
        "outcomes": _outcomes(runs) if first["requests"] else None,
        "outcome_table": _outcome_table(runs),
        "over_time": _over_time(first),
        "commands": commands,
        "made": [
            Table("Traffic", ("", ""), [(n.replace("_", " "), _words(x)) for n, x in data["traffic"].items()], "--"),
            *(
                Table(caption, ("", ""), list(facts.items()), "--")
                for caption, facts in (("Machine of the clients", machine), ("Versions there", versions))
                if facts
            ),
        ],
    }
    return put(path, filled("load.html", context))


def _badge(run: Row) -> tuple[str, str]:
    wrong = run["requests"] - run["codes"].get("ok", 0)
    if not wrong:
        return "good", "✓ Every request was answered with scores"
    return "bad", f"{whole(wrong)} of {whole(run['requests'])} requests got no scores"


def _headline(run: Row, without: Row | None) -> list[tuple[Markup, str]]:
    """At most five measured numbers, and what they are."""
    told = [(number(run["answered_per_second"], whole), "requests a second were answered")]
    if run["deadline_ms"]:
        in_time = f"of them within {milliseconds(run['deadline_ms'])}"
        told.append((number(run["goodput_per_second"] / max(1e-9, run["answered_per_second"]), share), in_time))
    for name, words in (("p50", "took half of the requests at most"), ("p99", "took 99 of 100 requests at most")):
        if name in run["latency_ms"]:
            told.append((number(run["latency_ms"][name], milliseconds), words))
    if scored := run["hits"] + run["misses"]:
        told.append((number(run["hits"] / scored, share), "of the answers found their user’s state"))
    if without and without["answered_per_second"] and run["scenario"] == "offline":
        gain = run["answered_per_second"] / without["answered_per_second"]
        told.append((number(gain, times), "the throughput without a store"))
    return told


def _percentiles(runs: Mapping[str, Row]) -> Markup | None:
    panels = []
    for words, run in runs.items():
        lines = []
        for kind, (label, role) in _LINES.items():
            known = [(100 / (100 - float(p)), ms) for p, ms in run["percentiles_ms"][kind].items() if ms > 0]
            if known and not (kind == "hits" and not run["misses"]):  # then all are hits
                lines.append(Series(label, role, tuple(Point(x, ms) for x, ms in known)))
        if lines:
            panels.append(Panel(words, tuple(lines)))
    if not panels:
        return None
    return charts.lines(
        "Latency by rarity",
        tuple(panels),
        show=milliseconds,
        x_label="one request in … took at least so long",
        y_label="from its time to its scores",
    )


def _latency_table(runs: Mapping[str, Row]) -> Table:
    known = list(dict.fromkeys(p for run in runs.values() for p in run["percentiles_ms"]["all"]))
    rows = [
        (f"{words}, {kind}", *(number(run["percentiles_ms"][kind].get(p), milliseconds) for p in known))
        for words, run in runs.items()
        for kind in _LINES
        if run["percentiles_ms"][kind]
    ]
    return Table("Latencies", ("", *(f"p{p}" for p in known)), rows, "-" + "n" * len(known))


def _outcomes(runs: Mapping[str, Row]) -> Markup:
    rows = []
    for words, run in runs.items():
        parts = (
            ("target", run["hits"]),
            ("user", run["misses"]),
            ("other", run["requests"] - run["codes"].get("ok", 0)),
        )
        rows.append(Bar(words, tuple((role, float(n)) for role, n in parts if n), float(run["requests"])))
    return charts.bars("What came of the requests", tuple(rows), whole, "requests")


def _outcome_table(runs: Mapping[str, Row]) -> Table:
    rows: list[tuple[object, ...]] = [
        (words, *(number(run[name], whole) for run in runs.values())) for name, words in _COUNTS.items()
    ]
    for code in dict.fromkeys(c for run in runs.values() for c in run["codes"] if c != "ok"):
        rows.append((f"answered {code}", *(number(run["codes"].get(code, 0), whole) for run in runs.values())))
    return Table("Requests", ("", *runs), rows, "-" + "n" * len(runs))


def _over_time(run: Row) -> list[tuple[str, Markup, str]]:
    """(heading, chart, caption): rates and latencies in the parts of the run; offline, all are due at once."""
    parts = run["timeline"]
    if len(parts) < 2:
        return []

    def line(label: str, role: str, name: str, *, dashed: bool = False) -> Series:
        points = tuple(Point(p["at"], p[name]) for p in parts if finite(p[name]))
        return Series(label, role, points, dashed=dashed)

    rates = [line("answered", "target", "answered_per_second")]
    if run["scenario"] == "server":
        rates.insert(0, line("offered", "other", "offered_per_second", dashed=True))
    times_ = tuple(s for s in (line("p50", "target", "p50_ms"), line("p95", "user", "p95_ms")) if s.points)
    made = [
        (
            "Requests a second",
            charts.lines(
                "Requests a second", (Panel("", tuple(rates)),), show=whole, log_x=False, log_y=False,
                x_label="seconds since the beginning", y_label="requests a second",
                y_range=(0, 1.1 * max(p["offered_per_second"] for p in parts)),
            ),
            "By the time at which a request was due: what is answered late counts where it was asked.",
        )
    ]  # fmt: skip
    if times_:
        chart = charts.lines(
            "Latency over time", (Panel("", times_),), show=milliseconds, log_x=False,
            x_label="seconds since the beginning", y_label="from its time to its scores",
        )  # fmt: skip
        made.append(
            ("Latency", chart, "Of the requests due in each part of the run; the axis of latencies is logarithmic.")
        )
    return made


def _words(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " to ".join(f"{x:g}" for x in value) if len(value) == 2 else ", ".join(f"{x:g}" for x in value)
    return "–" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)
