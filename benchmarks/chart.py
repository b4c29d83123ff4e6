"""The chart of a report, as data: what is drawn, not how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apb.plot import Interval, plot_bars, plot_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """One line of ``(x, y)`` per name, on logarithmic axes."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]

    def draw(self, path: Path) -> Path:
        labels = {"title": self.title, "x_label": self.x_label, "y_label": self.y_label}
        return plot_lines(path, self.series, **labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Groups of bars, or bars in pieces."""

    title: str
    y_label: str
    groups: Mapping[str, Mapping[str, Interval | float]]
    stacked: bool = False

    def draw(self, path: Path) -> Path:
        return plot_bars(
            path, self.groups, title=self.title, y_label=self.y_label, stacked=self.stacked
        )


Chart = Lines | Bars
