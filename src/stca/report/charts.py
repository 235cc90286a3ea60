"""The few kinds of chart a report needs, as inline SVG.

Charts carry classes and no colours: the page's style sheet gives them, so that a chart follows light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stca.report.markup import Markup, digits, el, pixels, power, whole


def _tick(shown: str) -> str:
    """A round number without its idle zeros: `10.0 ms` is `10 ms` on an axis."""
    return re.sub(r"\.0+(?= |$)", "", shown)


@dataclass(frozen=True)
class Axis:
    """Values `[low, high]` onto pixels `[begin, end]`, evenly or by logarithm."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`; what lies outside is drawn at the edge."""
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, self._inside(value)))
        return self.begin + (self.end - self.begin) * ((v - low) / (high - low))

    def _inside(self, value: float) -> float:
        return self.high if math.isnan(value) else min(max(value, self.low), self.high)

    def ticks(self, most: int = 7) -> list[float]:
        """Round values along the axis: powers of ten on a logarithmic one, with 2 and 5 where there is room."""
        if not self.log:
            step = _round_step((self.high - self.low) / max(1, most - 1))
            first = math.ceil(self.low / step - 1e-9)
            return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [s * 10.0**e for e in range(first, last + 1) for s in steps]
            ticks = [t for t in ticks if self.low * 0.999 <= t <= self.high * 1.001]
            if len(ticks) <= most:
                return ticks
        return ticks[:: math.ceil(len(ticks) / most)]


def _round_step(least: float) -> float:
    base = 10.0 ** math.floor(math.log10(least))
    return next(s * base for s in (1, 2, 2.5, 5, 10) if s * base >= least * (1 - 1e-9))


def log_axis(values: Iterable[float], begin: float, end: float, room: float = 1.6) -> Axis:
    """A logarithmic axis with room around the positive ones of `values`; one decade when there is only one value."""
    finite = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    low, high = min(finite) / room, max(finite) * room
    if high / low < 4:
        low, high = low / 2, high * 2
    return Axis(low, high, begin, end, log=True)


def linear_axis(low: float, high: float, begin: float, end: float, most: int = 5) -> Axis:
    """An even axis that begins and ends on a round value."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / most)
    return Axis(math.floor(low / step) * step, math.ceil(high / step) * step, begin, end)


@dataclass(frozen=True)
class Point:
    """A measured point; `high` ends its whisker, `hollow` says that it was scaled from a smaller measurement."""

    x: float
    y: float
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """A line of a chart. `kind` is its CSS class; `label` stands at its right end, values at its points if `named`."""

    label: str
    kind: str
    points: tuple[Point, ...]
    named: bool = False


_HEIGHT, _LEFT, _TOP, _BOTTOM = 300.0, 50.0, 40.0, 44.0
_WIDE = 920.0


def svg(
    width: float, height: float, title: str, about: str, *children: object, kind: str = "", style: str | None = None
) -> Markup:
    """A picture with its text alternative: `title` is its name, `about` says in words what it shows."""
    return el(
        "svg",
        el("title", title),
        el("desc", about),
        children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {pixels(width)} {pixels(height)}",
        role="img",
        aria_label=f"{title}. {about}",
        class_=f"chart {kind}".strip(),
        style=style,
    )


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """Points as the `d` of a path of straight lines."""
    return " ".join(f"{'L' if i else 'M'}{pixels(x)} {pixels(y)}" for i, (x, y) in enumerate(points))


def line_chart(
    title: str,
    about: str,
    series: Sequence[Series],
    *,
    show: Callable[[float], str],
    log_y: bool = True,
    x_label: str,
    y_label: str,
    trained: float | None = None,
) -> Markup:
    """Lines over a logarithmic x axis whose ticks are the measured x themselves.

    Args:
        show: a y value as text, for ticks and tooltips.
        trained: draws the part of the x axis up to here as what training saw.
    """
    width, right = 400.0, 16 + 7.2 * max(len(s.label) for s in series)
    points = [p for s in series for p in s.points]
    xs = sorted({p.x for p in points})
    ys = [y for p in points for y in (p.y, p.high) if y is not None and math.isfinite(y)] or [1.0]
    x = log_axis([*xs, *([trained] if trained else [])], _LEFT, width - right, room=1.25)
    floor, ceiling = _HEIGHT - _BOTTOM, _TOP
    if log_y:
        y = log_axis(ys, floor, ceiling)
    else:
        pad = 0.08 * (max(ys) - min(ys))
        y = linear_axis(min(ys) - pad, max(ys) + pad, floor, ceiling)
    parts: list[Markup] = []
    if trained:
        edge = x.at(trained)
        parts += [
            el("rect", x=_LEFT, y=ceiling, width=edge - _LEFT, height=floor - ceiling, class_="trained"),
            el("line", x1=edge, x2=edge, y1=ceiling, y2=floor, class_="boundary"),
            el("text", f"trained on ≤ {whole(trained)}", x=edge - 5, y=ceiling - 6, class_="note", text_anchor="end"),
            el("text", "never seen in training", x=edge + 5, y=ceiling - 6, class_="note"),
        ]
    for t in y.ticks():
        parts.append(el("line", x1=_LEFT, x2=width - right, y1=y.at(t), y2=y.at(t), class_="grid"))
        parts.append(el("text", _tick(show(t)), x=_LEFT - 7, y=y.at(t) + 3.5, text_anchor="end", class_="tick"))
    for t in _apart(xs, x, 34):
        parts.append(el("line", x1=x.at(t), x2=x.at(t), y1=floor, y2=floor + 4, class_="axis"))
        parts.append(el("text", whole(t), x=x.at(t), y=floor + 17, text_anchor="middle", class_="tick"))
    parts.append(el("line", x1=_LEFT, x2=width - right, y1=floor, y2=floor, class_="axis"))
    middle = (_LEFT + width - right) / 2
    parts.append(el("text", x_label, x=middle, y=_HEIGHT - 8, text_anchor="middle", class_="label"))
    parts.append(el("text", y_label, x=0, y=14, class_="label"))
    ends = _spread([y.at(s.points[-1].y) for s in series], 14, ceiling + 4, floor)
    for s, end in zip(series, ends, strict=True):
        parts.append(_line(s, x, y, show))
        last = s.points[-1]
        parts.append(el("text", s.label, x=x.at(last.x) + 10, y=end + 4, class_=f"name {s.kind}"))
    return svg(width, _HEIGHT, title, about, parts)


def _line(s: Series, x: Axis, y: Axis, show: Callable[[float], str]) -> Markup:
    marks = []
    for p in s.points:
        px, py = x.at(p.x), y.at(p.y)
        if p.high is not None:
            marks.append(el("line", x1=px, x2=px, y1=py, y2=y.at(p.high), class_="whisker"))
        tip = f"{s.label}: {show(p.y)} at {whole(p.x)}" + (" (scaled)" if p.hollow else "")
        marks.append(el("circle", el("title", tip), cx=px, cy=py, r=4, class_="mark hollow" if p.hollow else "mark"))
        if s.named:
            is_last = p is s.points[-1]  # its right side is the label's
            anchor = "end" if is_last else "middle"
            marks.append(el("text", show(p.y), x=px + 4 * is_last, y=py + 18, text_anchor=anchor, class_="value"))
    return el(
        "g", el("path", d=polyline((x.at(p.x), y.at(p.y)) for p in s.points), class_="line"), marks, class_=s.kind
    )


def _apart(values: Sequence[float], axis: Axis, least: float) -> list[float]:
    """Those of `values`, sorted, that can be labelled without touching; the last one always."""
    kept: list[float] = []
    for v in reversed(values):
        if not kept or axis.at(kept[-1]) - axis.at(v) >= least:
            kept.append(v)
    return kept[::-1]


def _spread(at: Sequence[float], least: float, top: float, bottom: float) -> list[float]:
    """Label positions near `at` and no closer than `least` to one another, in the order given."""
    placed = dict.fromkeys(range(len(at)), 0.0)
    previous = top - least
    for i in sorted(placed, key=lambda i: at[i]):
        placed[i] = previous = max(at[i], previous + least)
    over = max(0.0, previous - bottom)
    return [placed[i] - over for i in range(len(at))]


@dataclass(frozen=True)
class Limit:
    """One row of `limit_chart`: a value, the limit it must stay under, and what stands beside it where it has none."""

    label: str
    value: float
    limit: float | None
    good: bool
    note: str = ""


def limit_chart(title: str, about: str, rows: Sequence[Limit], x_label: str) -> Markup:
    """Values against their limits on a logarithmic axis: a dot each, and a bar over what is allowed.

    An exact zero has no logarithm: it lies on the left edge and says so. What is not finite lies on the right edge.
    """
    width, left, row = _WIDE, 130.0, 44.0
    height = 30 + row * len(rows) + 46
    floor = height - 46
    x = log_axis([v for r in rows for v in (r.value, r.limit or r.value)], left, width - 92, room=3)
    parts = []
    for t in x.ticks(10):
        parts.append(el("line", x1=x.at(t), x2=x.at(t), y1=18, y2=floor, class_="grid"))
        exponent = math.floor(math.log10(t) + 1e-9)
        lead = round(t / 10.0**exponent)
        shown = f"{'' if lead == 1 else f'{lead}×'}{power(exponent)}"
        parts.append(el("text", shown, x=x.at(t), y=floor + 17, text_anchor="middle", class_="tick"))
    for i, r in enumerate(rows):
        middle = 30 + row * i + row / 2 - 6
        parts.append(el("text", r.label, x=left - 14, y=middle + 4, text_anchor="end", class_="row"))
        if r.limit is not None:
            end = x.at(r.limit)
            parts.append(el("rect", x=left, y=middle - 9, width=end - left, height=18, class_="allowed"))
            parts.append(el("line", x1=end, x2=end, y1=middle - 13, y2=middle + 13, class_="limit"))
            parts.append(el("text", f"limit {digits(r.limit, 2)}", x=end + 6, y=middle + 4, class_="note"))
        else:
            parts.append(el("text", r.note, x=x.at(r.value) + 16, y=middle + 4, class_="note"))
        at = x.at(r.value)
        shown = "exact" if r.value == 0 else digits(r.value)
        parts.append(el("line", x1=left, x2=at, y1=middle, y2=middle, class_="stem good" if r.good else "stem bad"))
        tip = el("title", f"{r.label}: {shown}")
        parts.append(el("circle", tip, cx=at, cy=middle, r=6, class_="dot good" if r.good else "dot bad"))
        parts.append(el("text", shown, x=at, y=middle - 13, text_anchor="middle", class_="value"))
    parts.append(el("line", x1=left, x2=width - 92, y1=floor, y2=floor, class_="axis"))
    parts.append(el("text", x_label, x=(left + width - 92) / 2, y=height - 8, text_anchor="middle", class_="label"))
    return svg(width, height, title, about, parts, kind="wide")


@dataclass(frozen=True)
class Bar:
    """One row of `stacked_bars`: segments of (CSS class, name, value). Rows of one group stand together."""

    group: str
    label: str
    segments: tuple[tuple[str, str, float], ...]


def stacked_bars(title: str, about: str, bars: Sequence[Bar], show: Callable[[float], str], x_label: str) -> Markup:
    """Rows of segments end to end on an even axis from zero; each row ends in its total."""
    width, left, row = _WIDE, 250.0, 26.0
    groups = list(dict.fromkeys(b.group for b in bars))
    height = row * len(bars) + 14 * len(groups) + 46
    floor = height - 46
    total = max(sum(v for *_, v in b.segments) for b in bars)
    x = linear_axis(0, total, left, width - 92, most=6)
    parts = []
    for t in x.ticks(8):
        parts.append(el("line", x1=x.at(t), x2=x.at(t), y1=8, y2=floor, class_="grid"))
        parts.append(el("text", _tick(show(t)), x=x.at(t), y=floor + 17, text_anchor="middle", class_="tick"))
    y, group = 8.0, groups[0]
    for i, b in enumerate(bars):
        if b.group != group:
            y, group = y + 14, b.group
        if not i or bars[i - 1].group != group:
            parts.append(el("text", group, x=0, y=y + 17, class_="row group"))
        parts.append(el("text", b.label, x=left - 12, y=y + 17, text_anchor="end", class_="row"))
        done = 0.0
        for kind, name, value in b.segments:
            begin, end = x.at(done), x.at(done + value)
            tip = el("title", f"{b.group}, {b.label}, {name}: {show(value)}")
            parts.append(
                el("rect", tip, x=begin, y=y + 4, width=max(0.75, end - begin), height=18, class_=f"bar {kind}")
            )
            done += value
        parts.append(el("text", show(done), x=x.at(done) + 7, y=y + 17, class_="value"))
        y += row
    parts.append(el("line", x1=left, x2=left, y1=8, y2=floor, class_="axis"))
    parts.append(el("text", x_label, x=(left + width - 92) / 2, y=height - 8, text_anchor="middle", class_="label"))
    return svg(width, height, title, about, parts, kind="wide")
