"""The report's charts, drawn by matplotlib as inline SVG.

Each chart is drawn once for each of `WIDTHS`, and the style sheet shows the one that fits: text keeps its size on a
phone. Equal charts are drawn once. Colours are the style sheet's variables, so that charts follow light and dark.
"""

from __future__ import annotations

import functools
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stca.report.formats import digits, finite, power, whole

# Pixels, which are points here; the style sheet has the screen widths at which one takes over from another.
WIDTHS: Mapping[str, int] = {"narrow": 330, "middle": 660, "wide": 1280}
# Words of the style sheet and the colours that stand for them until the SVG is written.
_ROLES = ("ink", "muted", "grid", "paper", "user", "target", "request", "other", "good", "bad")
COLOUR: Mapping[str, str] = {role: f"#0101{i:02d}" for i, role in enumerate(_ROLES, 10)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stca",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that equal data gives equal bytes everywhere
    "font.size": 12,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": COLOUR["ink"],
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.labelsize": 12,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOUR["grid"],
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "lines.linewidth": 2.25,
    "figure.facecolor": "none",
}
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_OUTLINE = {"facecolor": COLOUR["paper"], "edgecolor": "none", "pad": 1, "alpha": 0.8}


@dataclass(frozen=True)
class Point:
    """A measured point; `high` ends its whisker, `hollow` says that it was scaled from a smaller measurement."""

    x: float
    y: float
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """A line of a chart in the colour of a role; `label` stands at its right end, values at its points if `named`."""

    label: str
    role: str
    points: tuple[Point, ...]
    dashed: bool = False
    named: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines that share one pair of axes."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Limit:
    """A value and the limit it must stay under; `note` stands where there is none."""

    label: str
    value: float
    limit: float | None
    good: bool
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A row: segments of (role, value) end to end, and a mark at `whole`, the measured time of all of it."""

    label: str
    segments: tuple[tuple[str, float], ...]
    whole: float


@functools.lru_cache(maxsize=32)
def lines(
    title: str,
    panels: tuple[Panel, ...],
    *,
    show: Callable[[float], str],
    x_label: str,
    y_label: str,
    log_x: bool = True,
    log_y: bool = True,
    y_range: tuple[float, float] | None = None,
    trained: float | None = None,
) -> Markup:
    """Panels side by side, with the same axes, over a logarithmic x axis whose ticks are the measured x themselves,
    or over an even one.

    Args:
        title: what the chart is called.
        panels: at least one; each has at least one point.
        show: a y value as text.
        x_label, y_label: what the axes count.
        log_x, log_y: whether the axes are logarithmic.
        y_range: ends of the y axis; None fits them to the points.
        trained: draws the part of the x axis up to here as what training saw.
    """
    about = "; ".join(
        f"{panel.title}, {s.label}: " + ", ".join(f"{show(p.y)} at {whole(p.x)}" for p in s.points)
        for panel in panels
        for s in panel.series
    )

    def draw(width: int) -> Figure:
        columns = min(len(panels), max(1, width // 320))
        rows = -(-len(panels) // columns)
        figure = _figure(width, 300 * rows, left=66, top=48 if trained else 30, across=(columns, 52), down=(rows, 100))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        room = 7.4 * max(len(s.label) for panel in panels for s in panel.series) / (width / columns)
        for i, ax in enumerate(axes.flat):
            if i >= len(panels):
                ax.set_visible(False)
                continue
            _panel(ax, panels[i], log_x=log_x, log_y=log_y, trained=trained)
            ax.tick_params(labelbottom=True, labelleft=True)
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label if i % columns == 0 else "")
        xs = [p.x for panel in panels for s in panel.series for p in s.points] + ([trained] if trained else [])
        # Labels stand in the plot's right part.
        if log_x:
            low, high = min(xs) / 1.25, max(xs) * 1.25
            axes[0, 0].set_xlim(low, high * (high / low) ** (room / (1 - room)))
        else:
            axes[0, 0].set_xlim(0, max(xs) / (1 - room))
        if y_range:
            axes[0, 0].set_ylim(*y_range)
        named = _ticks(axes[0, 0], sorted(set(xs)) if log_x else (), show, log_y, 45 / (width / columns - 60))
        for ax, panel in zip(axes.flat, panels, strict=False):
            _label_ends(ax, panel.series)
            for p in [p for s in panel.series if s.named for p in s.points if p.x in named]:
                ax.annotate(show(p.y), (p.x, p.y), (0, -19), textcoords="offset points", ha="center", weight="bold",
                            zorder=9, bbox=_OUTLINE)  # fmt: skip
        return figure

    return _chart(title, about, draw)


def _panel(ax: Axes, panel: Panel, *, log_x: bool, log_y: bool, trained: float | None) -> None:
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    ax.set_title(panel.title, pad=24 if trained else 8)
    if trained:
        ax.axvspan(0.01, trained, color=COLOUR["user"], alpha=0.08, linewidth=0)
        ax.axvline(trained, color=COLOUR["user"], linewidth=1.25, linestyle=(0, (4, 4)))
        for words, side, shift in ((f"trained on ≤ {whole(trained)}", "right", -5), ("never seen", "left", 5)):
            ax.annotate(words, (trained, 1), (shift, 5), xycoords=("data", "axes fraction"),
                        textcoords="offset points", ha=side, color=COLOUR["muted"])  # fmt: skip
    for s in panel.series:
        xs, ys = [p.x for p in s.points], [p.y for p in s.points]
        line = ax.plot(xs, ys, color=COLOUR[s.role], linestyle=(0, (2, 2.5)) if s.dashed else "-")[0]
        line.set_gid(f"line-{s.label.replace(' ', '-')}")
        for p in s.points:
            if p.high is not None:
                ax.vlines(p.x, p.y, p.high, color=COLOUR[s.role], alpha=0.45, linewidth=2)
            if (log_x and not s.dashed) or p.hollow:
                face = COLOUR["paper"] if p.hollow else COLOUR[s.role]
                ax.plot([p.x], [p.y], "o", markersize=7, color=COLOUR[s.role], markerfacecolor=face)


def _label_ends(ax: Axes, series: Sequence[Series]) -> None:
    """Names at the lines' right ends, moved apart where they would touch."""
    ends = sorted((ax.transData.transform((s.points[-1].x, s.points[-1].y))[1], i) for i, s in enumerate(series))
    placed: list[float] = []
    for at, _ in ends:
        placed.append(max(at, placed[-1] + 15) if placed else at)
    for (at, i), y in zip(ends, placed, strict=True):
        s = series[i]
        ax.annotate(s.label, (s.points[-1].x, s.points[-1].y), (10, y - at), textcoords="offset points", va="center",
                    color=COLOUR[s.role], weight="bold")  # fmt: skip


def _ticks(ax: Axes, xs: Sequence[float], show: Callable[[float], str], log_y: bool, least: float) -> list[float]:
    """Label the axes; those of `xs` that got a label, `least` being the part of the axis that keeps two apart. Without
    `xs` the x axis has even steps.
    """
    low, high = ax.get_xlim()
    kept: list[float] = []
    for x in reversed(xs):
        if not kept or math.log(kept[-1] / x) >= least * math.log(high / low):
            kept.append(x)
    if xs:
        ax.set_xticks(kept[::-1], [whole(x) for x in kept[::-1]])
    ax.xaxis.set_minor_locator(NullLocator())
    if log_y:
        bottom, top = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 50 else (1,), numticks=7))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: re.sub(r"\.0+(?= |$)", "", show(v))))
    return kept


@functools.lru_cache(maxsize=32)
def limits(title: str, rows: tuple[Limit, ...], x_label: str) -> Markup:
    """Values against their limits on a logarithmic axis: a dot each, and a bar over what is allowed.

    An exact zero has no logarithm: it lies on the left edge and says so. What is not finite lies on the right edge.
    """

    def said(r: Limit) -> str:
        error = "exact" if r.value == 0 else digits(r.value)
        return f"{error} · limit {digits(r.limit, 2)}" if r.limit is not None else f"{error} · {r.note}"

    def draw(width: int) -> Figure:
        figure = _figure(width, 54 * len(rows) + 66)
        ax = figure.subplots()
        known = [v for r in rows for v in (r.value, r.limit) if v is not None and finite(v) and v > 0] or [1.0]
        low, high = min(known) / 3, max(known) * 3
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.set_ylim(len(rows) - 0.3, -0.6)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        for i, r in enumerate(rows):
            role = COLOUR["good" if r.good else "bad"]
            at = min(max(r.value, low), high) if finite(r.value) else high
            if r.limit is not None:
                ax.barh(i, r.limit - low, 0.3, left=low, color=COLOUR["good"], alpha=0.13)
                ax.vlines(r.limit, i - 0.22, i + 0.22, color=COLOUR["good"], linewidth=2)
            ax.hlines(i, low, at, color=role, linewidth=2)
            ax.plot([at], [i], "o", markersize=10, color=role, markeredgecolor=COLOUR["paper"], clip_on=False)
            ax.annotate(r.label, (0, i), (0, 13), xycoords=("axes fraction", "data"), textcoords="offset points",
                        weight="bold")  # fmt: skip
            ax.annotate(said(r), (1, i), (0, 13), xycoords=("axes fraction", "data"), textcoords="offset points",
                        ha="right")  # fmt: skip
        steps = (1, 2, 5) if high / low < 300 and width > WIDTHS["narrow"] else (1,)
        ax.xaxis.set_major_locator(LogLocator(subs=steps, numticks=max(3, width // 110)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _scientific(v)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x")
        ax.set_xlabel(x_label)
        return figure

    return _chart(title, "; ".join(f"{r.label}: error {said(r)}" for r in rows), draw)


@functools.lru_cache(maxsize=32)
def bars(title: str, rows: tuple[Bar, ...], show: Callable[[float], str], x_label: str) -> Markup:
    """Rows of segments end to end on an even axis from zero, each with a mark at the measured time of the whole."""

    def draw(width: int) -> Figure:
        figure = _figure(width, 52 * len(rows) + 60)
        ax = figure.subplots()
        ax.set_xlim(0, 1.02 * max(max(r.whole, sum(v for _, v in r.segments)) for r in rows))
        ax.set_ylim(len(rows) - 0.4, -0.7)
        ax.set_yticks([])
        for i, r in enumerate(rows):
            begin = 0.0
            for role, value in r.segments:
                bar = ax.barh(i, value, 0.42, left=begin, color=COLOUR[role])
                bar[0].set_gid(f"bar-{i}-{role}")
                begin += value
            ax.vlines(r.whole, i - 0.23, i + 0.23, color=COLOUR["ink"], linewidth=2)
            ax.annotate(f"{r.label}: {show(r.whole)}", (0, i), (4, 14), textcoords="offset points")
        ax.xaxis.set_major_locator(MaxNLocator(max(3, width // 130)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: re.sub(r"\.0+(?= |$)", "", show(v))))
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x")
        ax.set_xlabel(x_label)
        return figure

    about = "; ".join(
        f"{r.label}: {show(r.whole)}, " + ", ".join(f"{n} {show(v)}" for n, v in r.segments) for r in rows
    )
    return _chart(title, about, draw)


def _scientific(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = round(value / 10.0**exponent)
    return f"{'' if lead == 1 else f'{lead}×'}{power(exponent)}"


def _figure(
    width: float,
    height: float,
    *,
    left: float = 8,
    top: float = 6,
    across: tuple[int, float] = (1, 0),
    down: tuple[int, float] = (1, 0),
) -> Figure:
    """An empty figure with fixed margins, all in pixels; laying out by the texts takes several times as long.

    Args:
        width, height: of all of it.
        left, top: room for what stands there; right of the axes there are 12, below them 50.
        across, down: columns and rows, and the gap between two.
    """
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    (columns, gap_x), (rows, gap_y) = across, down
    w = (width - left - 12 - gap_x * (columns - 1)) / columns
    h = (height - top - 50 - gap_y * (rows - 1)) / rows
    figure.subplots_adjust(left / width, 50 / height, 1 - 12 / width, 1 - top / height, gap_x / w, gap_y / h)
    return figure


def _chart(title: str, about: str, draw: Callable[[int], Figure]) -> Markup:
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own matplotlibrc says
        mpl.rcParams.update(_STYLE)
        return Markup("").join(_svg(draw(width), title, about, name) for name, width in WIDTHS.items())


def _svg(figure: Figure, title: str, about: str, size: str) -> Markup:
    """A figure as inline SVG with a text alternative, ids of its own, and colours by name."""
    written = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=nothing)
    ET.register_namespace("", _SVG)
    root = ET.fromstring(written.getvalue())
    for found in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(found)
    prefix = re.sub(r"\W+", "-", f"{title}-{size}")
    _own_ids(root.iter(), prefix)
    width, height = (root.attrib.pop(k).removesuffix("pt") for k in ("width", "height"))
    root.attrib.pop("version", None)
    root.attrib |= {"class": f"chart {size}", "role": "img", "aria-label": f"{title}. {about}"}
    root.attrib["style"] = f"max-width: {float(width):.0f}px; aspect-ratio: {float(width):.0f} / {float(height):.0f}"
    for i, (tag, words) in enumerate((("title", title), ("desc", about))):
        element = ET.Element(f"{{{_SVG}}}{tag}")
        element.text = words
        root.insert(i, element)
    text = ET.tostring(root, encoding="unicode")
    for role, stand_in in COLOUR.items():
        text = text.replace(stand_in, f"var(--{role})")
    return Markup(re.sub(r">\s+<", "><", text))


def _own_ids(elements: Iterable[ET.Element], prefix: str) -> None:
    """Ids that no other chart of the page has; links to them are plain `href`, as in HTML."""
    for element in elements:
        if "id" in element.attrib:
            element.attrib["id"] = f"{prefix}-{element.attrib['id']}"
        if _LINK in element.attrib:
            element.attrib["href"] = f"#{prefix}-{element.attrib.pop(_LINK)[1:]}"
        for name, value in element.attrib.items():
            if "url(#" in value:
                element.attrib[name] = value.replace("url(#", f"url(#{prefix}-")
