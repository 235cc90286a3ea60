"""The report a person can look at: one self-contained HTML file with pictures, tables and plain words.

It loads nothing, runs nothing and holds no date: equal data gives equal bytes. Every number in it is in the data, at
full precision in the `value` of a `<data>` element; what was not measured is left out, with a sentence that says why.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stca.bundle import Bundle
from stca.errors import StcaError
from stca.report.blocks import Condensed, condense
from stca.report.markup import (
    Markup,
    byte_count,
    details,
    digits,
    el,
    milliseconds,
    number,
    prose,
    share,
    table,
    times,
    whole,
)
from stca.report.sections import accuracy, by_size, cut, finite, is_scaled, latency, measured, parity, size_of
from stca.report.style import CSS

WHY_ABSENT: Mapping[str, str] = {
    "parity": "No check was run for this report; `stca verify` runs them.",
    "bench": "No latency was measured for this report; `stca bench` measures it.",
    "auc": "No accuracy was measured for this report: that takes a log with outcomes, and a bundle holds none.",
}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows. None or empty leaves a part out.

    Attributes:
        title: the report's heading.
        bundle: the loaded bundle; its manifest and its graphs are shown.
        parity: `stca.verify.ParityReport.as_dict()`.
        bench: `stca.bench.LatencyReport.as_dict()`: `rows` with `history`, `targets`, `stage`, `p50_ms`, `p95_ms`,
            `p99_ms`, `runs` and, where times were scaled up from fewer targets, `measured_targets`; `ratios` with
            `history`, `targets` and one entry for each ratio; `machine`.
        auc: for each length and task `history`, `task`, `auc`; every other number is a reference's on the same pairs.
        trained_history: longest history seen in training, in events.
        machine: what the figures were measured on, besides what `bench` says of it.
        commands: what made this report, in order.
        versions: of what took part, by name, besides what the manifest says.
        absent: for `parity`, `bench` or `auc`: why it is not there, when the caller knows better than `WHY_ABSENT`.
    """

    title: str
    bundle: Bundle
    parity: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    auc: Sequence[Mapping[str, Any]] = ()
    trained_history: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


def write(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Write the report to `path` in one step, and return it.

    Raises:
        StcaError: when `path` cannot be written.
    """
    target = Path(path)
    page = render(data)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            made = Path(work) / "page"
            made.write_text(page, encoding="utf-8")
            os.replace(made, target)
    except OSError as e:
        raise StcaError(f"{target}: the report cannot be written ({e.strerror}); choose another place") from e
    return target


def render(data: ReportData) -> str:
    """The report as HTML that is well-formed XML, too."""
    graph = condense(data.bundle)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        el("title", data.title),
        el("style", Markup(CSS)),
    )
    body = el(
        "main",
        _header(data),
        _plain_words(data, graph),
        _section("The graph and its cut", cut(data.bundle.manifest, graph)),
        _section(
            "Are the numbers still the model’s numbers?",
            parity(data.parity) if data.parity else _absent(data, "parity"),
        ),
        _section(
            "How fast is it?",
            latency(data.bench) if data.bench and data.bench.get("rows") else _absent(data, "bench"),
        ),
        _section(
            "Does a longer history help?",
            accuracy(data.auc, data.trained_history) if data.auc else _absent(data, "auc"),
        ),
        _section("How this was made", _making(data)),
        el("footer", "Made by stca. This file is complete in itself: it loads nothing and runs no script."),
    )
    return f"<!DOCTYPE html>\n{el('html', head, el('body', body), lang='en')}\n"


def _section(title: str, inside: object) -> Markup:
    return el("section", el("h2", title), inside)


def _absent(data: ReportData, part: str) -> Markup:
    return el("p", prose(data.absent.get(part) or WHY_ABSENT[part]), class_="missing")


def _header(data: ReportData) -> Markup:
    m = data.bundle.manifest
    kinds = {"stca": "reference STCA", "callable": "a module of your own", "onnx": "an ONNX model"}
    attention = f"{m.attention} attention" if m.attention else None
    facts = [kinds.get(str(m.model.get("kind"))), m.precision, attention, f"weights {m.weights[:12]}"]
    if not data.parity:
        badge = el("span", "Not checked", class_="badge none")
    elif data.parity["passed"]:
        badge = el("span", "✓ Every parity check passed", class_="badge good")
    else:
        failed = [s["name"] for s in data.parity["stages"] if not s["passed"]]
        badge = el("span", f"✗ Parity failed: {', '.join(failed)}", class_="badge bad")
    tiles = [el("div", el("dt", words), el("dd", value), class_="tile") for value, words in _headline(data)[:4]]
    return el(
        "header",
        el("p", " · ".join(f for f in facts if f), class_="eyebrow"),
        el("h1", data.title),
        badge,
        el("dl", tiles, class_="tiles") if tiles else None,
    )


def _headline(data: ReportData) -> list[tuple[Markup, str]]:
    """Measured numbers and what they are, the most telling first."""
    found: list[tuple[Markup, str]] = []
    bench = {"rows": (), "ratios": (), **(data.bench or {})}
    for name, words in (
        ("pointwise_over_miss", "as fast as scoring each candidate on its own"),
        ("miss_over_hit", "as fast again when the user’s state was kept"),
    ):
        if told := [r for r in by_size(bench["ratios"]) if finite(r.get(name))]:
            size = size_of(told[-1])
            if name == "pointwise_over_miss" and (k := _baseline_targets(bench["rows"], told[-1])):
                size += f"; baseline scaled from {whole(k)}"
            found.append((number(told[-1][name], times), f"{words} ({size})"))
    if checked := list((data.parity or {"stages": ()})["stages"])[1:]:
        worst = max(checked, key=lambda s: (not finite(s["max_abs"]), s["max_abs"]))
        found.append((number(worst["max_abs"], digits), "largest difference of any score from the float64 reference"))
    if told := [r for r in data.auc if finite(r["auc"])]:
        longest = max(told, key=lambda r: r["history"])
        seen = f", trained on at most {whole(data.trained_history)}" if data.trained_history else ""
        words = f"AUC of {longest['task']} at {whole(longest['history'])} events{seen}"
        found.append((number(longest["auc"], lambda v: f"{v:.4f}"), words))
    if hits := by_size(r for r in bench["rows"] if r["stage"] == "hit"):
        found.append((number(hits[-1]["p50_ms"], milliseconds), f"median time of a hit ({size_of(hits[-1])})"))
    return found


def _baseline_targets(rows: Sequence[Mapping[str, Any]], size: Mapping[str, Any]) -> int | None:
    """How many targets the baseline of this size was measured on, when that is not all of them."""
    same = (r for r in rows if all(r[k] == size[k] for k in ("history", "targets")))
    return next((measured(r) for r in same if r["stage"] == "pointwise" and is_scaled(r)), None)


def _plain_words(data: ReportData, graph: Condensed) -> Markup:
    part = graph.side_flops("user") / max(1, graph.flops)
    events = data.bundle.manifest.split["workload"].get("N_h")
    length = f"a history of {whole(events)} events" if events else "a history"
    steps = (
        (
            "user",
            "1 · Read the history once",
            f"The user encoder turns {length} into a few tensors. That is {share(part)} of the work of a request, "
            "counted in operations.",
        ),
        (
            "state",
            "2 · Keep what was read",
            f"The tensors are the user state, {byte_count(sum(s.bytes for s in graph.state))} in this model. Kept in "
            "memory, they serve the user’s next request, too.",
        ),
        (
            "target",
            "3 · Score the candidates",
            f"The target scorer compares each candidate with the state. Its {share(1 - part)} of the work is all that "
            "the user’s next request has to wait for.",
        ),
    )
    return _section(
        "In plain words",
        [
            el(
                "p",
                "A recommender chooses what to show next by comparing every candidate with what a person did before. ",
                "Reading a long history is a lot of work, and it is the same work for every candidate. So the model ",
                "is cut in two where nothing is lost: one half sees the history alone, the other half sees the ",
                "candidates. This page shows where the cut runs, whether the scores stay the same, and what it buys.",
            ),
            el(
                "div",
                [el("div", el("h3", h), el("p", p), class_=f"step {kind}") for kind, h, p in steps],
                class_="steps",
            ),
        ],
    )


def _making(data: ReportData) -> list[Markup | None]:
    m = data.bundle.manifest
    machine = {**(data.bench or {}).get("machine", {}), **data.machine}
    versions = {**m.producer, **data.versions}
    files = [(el("code", n), number(f["bytes"], byte_count), el("code", f["sha256"])) for n, f in m.files.items()]
    return [
        el("pre", el("code", "\n".join(data.commands))) if data.commands else None,
        el(
            "div",
            table(("", ""), list(machine.items()), caption="Machine") if machine else None,
            table(("", ""), list(versions.items()), caption="Versions") if versions else None,
            class_="facts",
        ),
        details(
            f"Files of the bundle {data.bundle.path.name}",
            table(("file", "size", "SHA-256"), files, caption="Files", numeric="-n-"),
        ),
    ]
