"""Statistics as a report states them, and the two files of a report."""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import ApbError
from apb.output import write_json
from apb.plot import Interval
from benchmarks.chart import Chart
from benchmarks.environment import hardware_slug


class Estimate(NamedTuple):
    """A mean and its standard error, which a single value does not have."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        if len(values) == 1:
            return cls(values[0], None)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))

    def text(self, digits: int, *, signed: bool = False) -> str:
        sign = "+" if signed else ""
        mean = f"{self.mean:{sign}.{digits}f}"
        return mean if self.error is None else f"{mean} ± {self.error:.{digits}f}"

    def interval(self) -> Interval:
        """As a chart wants it: one standard error to both sides."""
        error = self.error or 0.0
        return Interval(0.0, self.mean, self.mean - error, self.mean + error)


class Spread(NamedTuple):
    """Median, smallest and largest of a few repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    def interval(self, scale: float = 1.0) -> Interval:
        """As a chart wants it."""
        return Interval(0.0, *(scale * value for value in self))


def report_stem(benchmark: str, model: str) -> str:
    """What a report is called, without its ending."""
    return f"{benchmark}_{model}_{hardware_slug()}_{date.today():%Y%m%d}"


def write_report(
    folder: Path,
    benchmark: str,
    model: str,
    lines: Sequence[str],
    data: dict[str, Any],
    chart: Chart | None = None,
) -> Path:
    """Write ``<benchmark>_<model>_<hardware>_<yyyymmdd>.{md,json,svg}``; returns the Markdown file.

    Without matplotlib there is no chart: figures that took hours are not lost for want of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = report_stem(benchmark, model)
    write_json(folder / f"{stem}.json", data)
    if chart is not None:
        try:
            drawn = chart.draw(folder / f"{stem}.svg")
            lines = [*lines, "", f"![{chart.title}]({drawn.name})"]
        except ApbError as error:
            print(f"no chart: {error}", file=sys.stderr)
    path = folder / f"{stem}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def print_report(run: Callable[[], Path | None]) -> int:
    """Run a benchmark and print the report it wrote, if any; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    try:
        path = run()
    except ApbError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if path is not None:
        print(path.read_text(encoding="utf-8"))
        print(f"report: {path}", file=sys.stderr)
    return 0
