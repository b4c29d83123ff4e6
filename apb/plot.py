"""Line charts for reports, legible on light and dark backgrounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apb.errors import ApbError

_INK = "#7d7d7d"
_COLOURS = ("#1f8fd6", "#e07b00", "#2ca05a", "#c44e9c", "#a08400", "#6a6ae0", "#d04a3a")


def plot_lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> Path:
    """Write an SVG with logarithmic axes, one line per series of ``(x, y)`` points.

    Raises:
        ApbError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ApbError("plots need matplotlib: pip install 'apb[bench]'") from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "apb",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), colour in zip(series.items(), _COLOURS, strict=False):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker="o", color=colour, label=name)
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set(xscale="log", yscale="log", title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(color=_INK, alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path
