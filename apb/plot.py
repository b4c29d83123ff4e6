"""Charts for reports, legible on light and dark backgrounds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import ApbError

_INK = "#7d7d7d"
_COLOURS = ("#1f8fd6", "#e07b00", "#2ca05a", "#c44e9c", "#a08400", "#6a6ae0", "#d04a3a")
_LINE = 84
"""Characters below an axis, in all."""
_MOST_LEVEL = 8
"""Labels that have room beside one another."""
_NUDGE = 1.02
"""Neighbouring series are drawn so much apart, so that their intervals do not hide each other."""


class Interval(NamedTuple):
    """A point with what is known of its height."""

    x: float
    y: float
    low: float
    high: float


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
        ApbError: matplotlib is not installed, or the file cannot be written.
    """
    with _drawn(path, title=title, xlabel=x_label, ylabel=y_label) as axes:
        for (name, points), colour in zip(series.items(), _COLOURS, strict=False):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker="o", color=colour, label=name)
        axes.set(xscale="log", yscale="log")
        _mark(axes, (x for points in series.values() for x, _ in points))
    return path


def plot_intervals(
    path: Path,
    series: Mapping[str, Sequence[Interval]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float],
) -> Path:
    """Write an SVG with a logarithmic x axis, one line with intervals per series.

    Raises:
        ApbError: matplotlib is not installed, or the file cannot be written.
    """
    with _drawn(path, title=title, xlabel=x_label, ylabel=y_label) as axes:
        for place, (name, points) in enumerate(series.items()):
            shift = _NUDGE ** (place - (len(series) - 1) / 2)
            axes.errorbar(
                [shift * point.x for point in points],
                [point.y for point in points],
                yerr=[[p.y - p.low for p in points], [p.high - p.y for p in points]],
                marker="o",
                capsize=3,
                color=_COLOURS[place % len(_COLOURS)],
                label=name,
            )
        axes.set(xscale="log", ylim=y_range)
        _mark(axes, (point.x for points in series.values() for point in points))
    return path


def plot_bars(
    path: Path,
    groups: Mapping[str, Mapping[str, Interval | float]],
    *,
    title: str,
    y_label: str,
    stacked: bool = False,
) -> Path:
    """Write an SVG with a group of bars per name, or one bar in pieces; x of intervals is ignored.

    Raises:
        ApbError: matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    wide = 0.8 if stacked else 0.8 / len(names)
    with _drawn(path, title=title, ylabel=y_label) as axes:
        tops = dict.fromkeys(groups, 0.0)
        for place, name in enumerate(names):
            shift = 0.0 if stacked else wide * (place - (len(names) - 1) / 2)
            for index, (group, values) in enumerate(groups.items()):
                if name not in values:
                    continue
                bar = values[name]
                y = bar.y if isinstance(bar, Interval) else bar
                error = [[y - bar.low], [bar.high - y]] if isinstance(bar, Interval) else None
                axes.bar(
                    index + shift,
                    y,
                    wide,
                    bottom=tops[group] if stacked else 0.0,
                    yerr=error,
                    ecolor=_INK,
                    capsize=2,
                    color=_COLOURS[place % len(_COLOURS)],
                    label=name if name not in axes.get_legend_handles_labels()[1] else None,
                )
                tops[group] += y
        if len(groups) > _MOST_LEVEL:
            axes.set_xticks(range(len(groups)), groups, rotation=35, ha="right")
        else:
            room = max(9, _LINE // len(groups))
            names = [textwrap.fill(name, room, break_long_words=False) for name in groups]
            axes.set_xticks(range(len(groups)), names)
        axes.margins(y=0.12)
    return path


@contextmanager
def _drawn(path: Path, **labels: str) -> Iterator[Any]:
    """Axes to draw on, written to `path` in the end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ApbError("plots need matplotlib: pip install 'apb[bench]'") from error
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(ink, _INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "apb"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        yield axes
        axes.set(**labels)
        axes.grid(color=_INK, alpha=0.25)
        axes.legend(frameon=False)
        try:
            figure.savefig(path, transparent=True, metadata={"Date": None})
        except OSError as error:
            raise ApbError(f"{path} cannot be written: {error.strerror}") from error


def _mark(axes: Any, xs: Iterable[float]) -> None:
    """Ticks where there are points, and nowhere else."""
    ticks = sorted(set(xs))
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    axes.set_xticks([], minor=True)
