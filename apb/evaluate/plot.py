"""Scores by length as a chart that is legible on light and dark backgrounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apb.evaluate.summary import Summary

_INK = "#7d7d7d"
_COLOURS = ("#1f8fd6", "#e07b00", "#2ca05a", "#c44e9c", "#a08400", "#6a6ae0", "#d04a3a")
_NUDGE = 1.02
"""Neighbouring methods are drawn so much apart, so that their intervals do not hide each other."""


def plot_scores(summary: Summary, path: Path, *, title: str) -> bool:
    """Write an SVG with a line and 95 % intervals per method, where matplotlib and scores are."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return False
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(ink, _INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "apb"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        drawn = set[int]()
        for place, method in enumerate(summary.methods):
            entries = [summary.find("score", method, length=length) for length in summary.lengths]
            points = [(entry.length, entry.value) for entry in entries if entry and entry.length]
            if not points:
                continue
            drawn.update(length for length, _ in points)
            shift = _NUDGE ** (place - (len(summary.methods) - 1) / 2)
            means = [100 * value.mean for _, value in points]
            below = [100 * (value.mean - value.low) for _, value in points]
            above = [100 * (value.high - value.mean) for _, value in points]
            axes.errorbar(
                [shift * length for length, _ in points],
                means,
                yerr=[below, above],
                marker="o",
                capsize=3,
                color=_COLOURS[place % len(_COLOURS)],
                label=method,
            )
        if not drawn:
            return False
        ticks = sorted(drawn)
        axes.set(xscale="log", title=title, xlabel="tokens of the document", ylabel="score, %")
        axes.set_ylim(-3, 103)
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(color=_INK, alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return True
