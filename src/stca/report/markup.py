"""Elements of the picture: markup that cannot be broken by what it shows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from markupsafe import Markup, escape

# Characters that XML 1.0 forbids, and lone surrogates, which UTF-8 cannot hold.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(value: str) -> str:
    """`value` without characters that no page can hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)


def text(value: object) -> Markup:
    """`value` as markup: itself when it is, else escaped; iterables in order, None as nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("")
    if isinstance(value, Iterable) and not isinstance(value, str):
        return Markup("").join(map(text, value))
    return escape(pixels(value) if isinstance(value, float) else clean(str(value)))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """One element. `_` in an attribute's name stands for `-`, at its end for nothing; None leaves an attribute out."""
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{shown}>{text(children)}</{tag}>")


def svg(
    width: float, height: float, title: str, about: str, *children: object, kind: str = "", style: str | None = None
) -> Markup:
    """A picture with its text alternative.

    Args:
        width, height: in pixels, at which it is drawn.
        title: its name.
        about: says in words what it shows.
        children: what is in it.
        kind, style: as HTML's `class` and `style`.
    """
    return el(
        "svg",
        el("title", title),
        el("desc", about),
        children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {pixels(width)} {pixels(height)}",
        role="img",
        aria_label=f"{title}. {about}",
        class_=kind,
        style=style,
    )


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """Points as the `d` of a path of straight lines."""
    return " ".join(f"{'L' if i else 'M'}{pixels(x)} {pixels(y)}" for i, (x, y) in enumerate(points))


def pixels(value: float) -> str:
    """A coordinate: two decimals are finer than a screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else str(value)
