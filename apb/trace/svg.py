"""Pieces of SVG. Colours are classes of the page's style sheet, so that they follow its theme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH = 960
"""Of every chart, in units of its own; pages scale them."""


def element(name: str, *content: str, **attributes: Any) -> str:
    """An element; `class_` is its class, and numbers are rounded to what can be seen."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    text = "".join(f' {key}="{escape(_short(value))}"' for key, value in given.items())
    return f"<{name}{text}>{''.join(content)}</{name}>"


def _short(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def chart(height: float, parts: Sequence[str], *, label: str) -> str:
    """A chart of its own; `label` is what those hear who cannot see it."""
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {_short(float(height))}",
        role="img",
        aria_label=label,
    )


def rect(
    x: float, y: float, width: float, height: float, class_: str, hint: str = "", **more: Any
) -> str:
    """A filled rectangle; `hint` shows where the pointer rests on it."""
    title = [element("title", escape(hint))] if hint else []
    return element(
        "rect",
        *title,
        x=float(x),
        y=float(y),
        width=float(width),
        height=float(height),
        class_=class_,
        **more,
    )


def text(x: float, y: float, words: str, class_: str = "", *, anchor: str = "start") -> str:
    return element("text", escape(words), x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str, hint: str = "") -> str:
    """A line through points."""
    title = [element("title", escape(hint))] if hint else []
    steps = " ".join(f"{_short(float(x))},{_short(float(y))}" for x, y in points)
    return element("polyline", *title, points=steps, class_=class_)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that divide a range into about `count` parts."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    scale = 10.0 ** _floor_log10(rough)
    step = next(scale * times for times in (1, 2, 5, 10) if scale * times >= rough)
    first = -int(-low // step)
    return [index * step for index in range(first, int(high // step + 1e-9) + 1)]


def _floor_log10(value: float) -> int:
    exponent = 0
    while value >= 10:
        value, exponent = value / 10, exponent + 1
    while value < 1:
        value, exponent = value * 10, exponent - 1
    return exponent


def amount(value: float, unit: str) -> str:
    """A quantity in the unit that suits it: seconds as s or ms, bytes as GiB to KiB."""
    if unit == "s":
        if value >= 1 or value == 0:
            return f"{value:.3g} s"
        return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.0f} B"
