"""Charts of reports, drawn from the figures of reports that are in the repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from apb.plot import Interval
from benchmarks import (
    attention_report,
    decode_report,
    overlap,
    prefill_report,
    quality_report,
)
from benchmarks.attention_runs import Time
from benchmarks.chart import Bars, Chart, Lines
from benchmarks.decode_runs import Run as DecodeRun
from benchmarks.environment import REPORTS
from benchmarks.memory import RankMemory
from benchmarks.overlap_report import Prefill
from benchmarks.prefill_runs import Run, Variant
from benchmarks.quality_tasks import Row
from benchmarks.report import Spread, write_report

Data = Mapping[str, Any]


def _prefill(data: Data) -> Chart:
    runs = [
        Run(**{**run, "memory": [RankMemory(**one) for one in run["memory"]]})
        for run in data["runs"]
    ]
    variants = [Variant(**variant) for variant in data["variants"]]
    return prefill_report.chart(runs, variants, "a model")


CHARTS: dict[str, Callable[[Data], Chart]] = {
    "prefill_": _prefill,
    "decode_": lambda data: decode_report.chart(
        [DecodeRun(**run) for run in data["runs"]], "a model", plain="none"
    ),
    "attention_": lambda data: attention_report.chart([Time(**time) for time in data["times"]]),
    "quality_": lambda data: quality_report.chart(
        quality_report.summarise(
            [Row(**row) for row in data["rows"]], list(data["settings"]["methods"])
        ),
        "a model",
    ),
    "overlap_": lambda data: overlap._chart([Prefill(**one) for one in data["prefills"]], "model"),
}


@pytest.mark.parametrize("name", CHARTS)
def test_the_figures_of_a_report_can_be_drawn(tmp_path: Path, name: str) -> None:
    newest = max(REPORTS.glob(f"{name}*.json"))
    chart = CHARTS[name](json.loads(newest.read_text()))
    root = ElementTree.parse(chart.draw(tmp_path / "chart.svg")).getroot()
    words = "".join("".join(element.text or "" for element in root.iter()).split())
    names = list(chart.series) if isinstance(chart, Lines) else list(chart.groups)
    for word in (chart.title, *names):
        assert "".join(word.split()) in words


def test_bars_stand_beside_or_upon_one_another(tmp_path: Path) -> None:
    groups: dict[str, dict[str, Interval | float]] = {
        "a": {"x": Interval(0, 2.0, 1.5, 2.5), "y": 3.0},
        "b": {"y": 1.0},
    }
    tops = {}
    for stacked in (False, True):
        bars = Bars(title="t", y_label="s", groups=groups, stacked=stacked)
        text = bars.draw(tmp_path / "bars.svg").read_text()
        ElementTree.fromstring(text)
        tops[stacked] = [float(tick) for tick in _ticks(text)]
    assert max(tops[False]) < 4 < max(tops[True])


def _ticks(text: str) -> list[str]:
    words = [element.text or "" for element in ElementTree.fromstring(text).iter()]
    return [word for word in words if word.replace(".", "", 1).isdigit()]


def test_a_report_has_its_chart_beside_it(tmp_path: Path) -> None:
    spread = Spread.of([1.0, 2.0, 4.0])
    chart = Bars(title="a chart", y_label="s", groups={"a": {"x": spread.interval(1e3)}})
    path = write_report(tmp_path, "name", "model", ["# Title"], {"a": 1}, chart)
    assert path.with_suffix(".svg").is_file()
    assert path.read_text().endswith(f"![a chart]({path.stem}.svg)\n")
    assert spread.interval(1e3) == (0.0, 2e3, 1e3, 4e3)


def test_many_groups_keep_their_names_whole(tmp_path: Path) -> None:
    groups = {f"a long name {index}": {"x": 1.0} for index in range(12)}
    text = Bars(title="t", y_label="s", groups=groups).draw(tmp_path / "bars.svg").read_text()
    words = [element.text for element in ElementTree.fromstring(text).iter()]
    assert groups.keys() <= set(words)
