"""The report a person can look at: one self-contained HTML file with pictures, tables and plain words.

It loads nothing, runs nothing and holds no date: equal data gives equal bytes. Every number in it is in the data, at
full precision in the `value` of a `<data>` element; what was not measured is left out, with a sentence that says why.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stca.account import check_account
from stca.bundle import Bundle
from stca.errors import StcaError
from stca.report import eight_bits, formats, latency, page
from stca.report.blocks import Condensed, condense
from stca.report.markup import clean
from stca.report.picture import block_picture

WHY_ABSENT: Mapping[str, str] = {
    "parity": "No check was run for this report; `stca verify` runs them.",
    "bench": "No latency was measured for this report; `stca bench` measures it.",
    "auc": "No accuracy was measured for this report: that takes a log with outcomes, and a bundle holds none.",
}
_KINDS = {"stca": "reference STCA", "callable": "a module of your own", "onnx": "an ONNX model"}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows. None or empty leaves a part out.

    Attributes:
        title: the report's heading.
        bundle: the loaded bundle; its manifest and its graphs are shown.
        parity: `stca.checks.verify.ParityReport.as_dict()`.
        bench: `stca.checks.bench.LatencyReport.as_dict()`: `rows` with `history`, `targets`, `stage`, `p50_ms`,
            `p95_ms`, `p99_ms`, `runs` and, where times were scaled up from fewer targets, `measured_targets`; `ratios`
            with `history`, `targets` and one entry for each ratio; `machine`; `versions`.
        auc: for each length and task `history`, `task`, `auc`; every other number is a reference's on the same pairs.
        trained_history: longest history seen in training, in events.
        machine: what the figures were measured on, besides what `bench` says of it.
        commands: what made this report, in order.
        versions: of what made the figures, by name, besides what `bench` says.
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
    return put(path, render(data))


def put(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page in one step.

    Args:
        path: the file; one that is there is replaced.
        text: the page.

    Raises:
        StcaError: when `path` cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
            made = Path(work) / "page"
            made.write_text(text, encoding="utf-8")
            os.replace(made, target)
    except OSError as e:
        raise StcaError(f"{target}: the report cannot be written ({e.strerror}); choose another --out") from e
    return target


def render(data: ReportData) -> str:
    """The report as HTML that is well-formed XML, too."""
    check_account(data.bundle.manifest)
    data = dataclasses.replace(
        data, **{f.name: _cleaned(getattr(data, f.name)) for f in dataclasses.fields(data) if f.name != "bundle"}
    )
    return filled("report.html", _context(data, condense(data.bundle)))


def filled(template: str, context: Mapping[str, Any]) -> str:
    """A page of one of the templates, with the style sheet in it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stca.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    for show in (formats.share, formats.flop_count, formats.byte_count, formats.whole):
        environment.filters[show.__name__] = show
    css = Markup(environment.get_template("style.css").render())
    return environment.get_template(template).render(css=css, **context) + "\n"


def _context(data: ReportData, graph: Condensed) -> dict[str, Any]:
    """All that the template names."""
    m, space = data.bundle.manifest, "\N{NO-BREAK SPACE}"
    events = m.split["workload"].get("N_h")
    attention = f"{m.attention} attention" if m.attention else None
    parity, bench = data.parity, data.bench if data.bench and data.bench.get("rows") else None
    side_by_side, bench = (
        latency.engine_tables(bench) if bench else [],
        latency.of_first_engine(bench) if bench else None,
    )
    accuracy = page.accuracy(data.auc, data.trained_history) if data.auc else None
    return {
        "title": data.title,
        "facts": [
            f for f in (_KINDS.get(str(m.model.get("kind"))), m.precision, attention, f"weights {m.weights[:12]}") if f
        ],
        "badge": _badge(parity),
        "headline": page.headline(parity, bench, data.auc, data.trained_history),
        "length": f"a history of {formats.whole(events)} events" if events else "a history",
        "user_share": graph.side_flops("user") / max(1, graph.flops),
        "without_rules": m.split.get("hit_work_without_rules"),
        "hit_work": sum(m.split[f"{part}_work"] for part in ("recomputed", "request", "target")),
        "graph": graph,
        "blocks": page.in_order(graph),
        "block_name": page.block_name,
        "picture": block_picture(graph),
        "nominal": ", ".join(f"{n}{space}={space}{formats.whole(size)}" for n, size in m.split["workload"].items()),
        "notices": page.notices(m),
        "graph_tables": page.graph_tables(m, graph),
        "parity": parity,
        "takes_none": not m.min_history,
        "parity_chart": page.parity_chart(parity) if parity else None,
        "parity_terms": [("", *page.STAGES[s["name"]]) for s in parity["stages"] if s["name"] in page.STAGES]
        if parity
        else [],
        "parity_table": page.parity_table(parity) if parity else None,
        "latency": latency.charts_of(bench) if bench else None,
        "engine_tables": side_by_side,
        "latency_tables": latency.tables_of(bench) if bench else [],
        "ways": [
            (kind, name, says)
            for name, (kind, says) in latency.WAYS.items()
            if bench and any(r["stage"] == name for r in bench["rows"])
        ],
        "eight_bits": _in_eight_bits(m.quantization),
        "accuracy": accuracy,
        "accuracy_terms": [("other", *pair) for pair in accuracy[2]] if accuracy else [],
        "trained": data.trained_history,
        "commands": data.commands,
        "made": page.made_tables(
            m,
            {**(bench or {}).get("machine", {}), **data.machine},
            {**(bench or {}).get("versions", {}), **data.versions},
        ),
        "bundle_name": data.bundle.path.name,
        "absent": {part: page.code(clean(data.absent.get(part) or why)) for part, why in WHY_ABSENT.items()},
    }


def _in_eight_bits(told: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a calibration found, for the template; None where there was none."""
    told = _cleaned(told or {})
    if not (summary := eight_bits.summary(told)):
        return None
    return {"summary": summary, "charts": eight_bits.charts_of(told), "tables": eight_bits.tables_of(told)}


def _badge(parity: Mapping[str, Any] | None) -> tuple[str, str]:
    if not parity:
        return "none", "Not checked"
    if parity["passed"]:
        return "good", "✓ Every parity check passed"
    return "bad", f"✗ Parity failed: {', '.join(s['name'] for s in parity['stages'] if not s['passed'])}"


def _cleaned(value: Any) -> Any:
    """JSON-like data without characters that no page can hold."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {_cleaned(k): _cleaned(v) for k, v in value.items()}
    return [_cleaned(v) for v in value] if isinstance(value, list | tuple) else value
