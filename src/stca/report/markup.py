"""Markup that cannot be broken by what it shows: elements, tables, and numbers as a person reads them.

Everything is made by `el`, which escapes. The output is well-formed XML and depends on the data alone.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence

# Characters that XML 1.0 forbids, and lone surrogates, which UTF-8 cannot hold.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VOID = {"br", "hr", "meta"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Markup(str):
    """Text that is markup already; any other value is escaped when it becomes a part of markup."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as markup: itself when it is, else escaped; iterables in order, None as nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return Markup("".join(map(text, value)))
    plain = pixels(value) if isinstance(value, float) else str(value)
    return Markup(html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", plain)))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """One element. `_` in an attribute's name stands for `-`, at its end for nothing; None leaves an attribute out."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{shown}/>" if tag in _VOID else f"<{tag}{shown}>{text(children)}</{tag}>")


def prose(sentence: str) -> Markup:
    """A sentence in which backticks enclose code."""
    return text(el("code", part) if i % 2 else part for i, part in enumerate(sentence.split("`")))


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str, numeric: str = "") -> Markup:
    """A table. `numeric` has one letter for each column, `n` for those of numbers; the rest are words."""

    def kind(i: int) -> str | None:
        return "n" if numeric[i : i + 1] == "n" else None

    head = el("tr", [el("th", h, scope="col", class_=kind(i)) for i, h in enumerate(headings)])
    body = [el("tr", [el("td", cell, class_=kind(i)) for i, cell in enumerate(row)]) for row in rows]
    return el("table", el("caption", caption), el("thead", head) if any(headings) else None, el("tbody", body))


def scroll(inside: object, name: str) -> Markup:
    """A part of the page that scrolls sideways on its own where it is too wide, by keyboard, too."""
    return el("div", inside, class_="scroll", tabindex="0", role="region", aria_label=name)


def details(name: str, inside: object, *, is_open: bool = False) -> Markup:
    """A part that a click opens."""
    return el("details", el("summary", name), scroll(inside, name), open="open" if is_open else None)


def terms(pairs: Iterable[tuple[str, str, str]]) -> Markup:
    """Words and what they mean, as (CSS class, word, meaning)."""
    return el(
        "dl", [(el("dt", word, class_=kind or None), el("dd", says)) for kind, word, says in pairs], class_="terms"
    )


def number(value: float | None, show: Callable[[float], str]) -> Markup:
    """A number as `show` writes it, with the exact value beside it for machines; a dash when there is none."""
    if value is None or math.isnan(value):
        return text("–")
    return el("data", show(value), value=repr(value))


def pixels(value: float) -> str:
    """A coordinate: two decimals are finer than a screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else str(value)


def digits(value: float, n: int = 3) -> str:
    """`n` significant digits: `0.0123`, `1,230`, `1.23×10⁻⁷`."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{n - 1}e}".split("e")
    if not -4 <= int(exponent) <= 8:
        return f"{mantissa}×{power(int(exponent))}"
    return f"{float(f'{mantissa}e{exponent}'):,.{max(0, n - 1 - int(exponent))}f}"


def power(exponent: int) -> str:
    """A power of ten."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def whole(value: float) -> str:
    """A count: `10,000`."""
    return f"{value:,.0f}"


def times(value: float) -> str:
    """A ratio: `3.53×`."""
    return f"{digits(value)}×"


def share(value: float) -> str:
    """A fraction as a percentage; what is not all or nothing never reads so."""
    if 0 < value < 1e-3:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.{1 if 0 < value < 0.1 or 0.99 < value < 1 else 0}f} %"


def milliseconds(value: float) -> str:
    """A time given in ms, as µs, ms or s."""
    return _in_units(value, ((1e3, "s"), (1, "ms"), (1e-3, "µs")))


def byte_count(value: float) -> str:
    """Decimal kB, MB, GB; whole bytes below."""
    return f"{value:.0f} B" if value < 1000 else _in_units(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def flop_count(value: float) -> str:
    """Floating-point operations."""
    return _in_units(value, ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP")))


def _in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    """`value` in the largest of `units` (size, name) that it reaches, else in the last; zero has no unit."""
    if value == 0:
        return "0"
    size, name = next((u for u in units if abs(value) >= u[0]), units[-1])
    return f"{digits(value / size)} {name}"
