"""Scores by length as a chart."""

from __future__ import annotations

from pathlib import Path

from apb.evaluate.summary import Summary
from apb.plot import Interval, plot_intervals


def plot_scores(summary: Summary, path: Path, *, title: str) -> bool:
    """Write an SVG with a line and 95 % intervals per method, if any has scores.

    Raises:
        ApbError: matplotlib is not installed, or the file cannot be written.
    """
    series: dict[str, list[Interval]] = {}
    for method in summary.methods:
        for length in summary.lengths:
            entry = summary.find("score", method, length=length)
            if entry is not None:
                _, *shares = entry.value
                mean, low, high = (100 * share for share in shares)
                series.setdefault(method, []).append(Interval(length, mean, low, high))
    if not series:
        return False
    labels = {"title": title, "x_label": "tokens of the document", "y_label": "score, %"}
    plot_intervals(path, series, **labels, y_range=(-3, 103))
    return True
