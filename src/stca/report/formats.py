"""Numbers and tables as a person reads them; none of them depends on the page that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Row = Mapping[str, Any]
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Table:
    """A table. `kinds` has a letter for each column: `n` of numbers, `c` of code, anything else of words."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    kinds: str


def number(value: float | None, show: Callable[[float], str]) -> Markup:
    """A number as `show` writes it, with the exact value beside it for machines; a dash when there is none."""
    if value is None or math.isnan(value):
        return Markup("–")
    return Markup('<data value="{}">{}</data>').format(repr(value), show(value))


def finite(value: object) -> bool:
    """Whether `value` is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


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


def auc(value: float) -> str:
    """An AUC: four decimals, which is finer than its standard error."""
    return f"{value:.4f}"


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
