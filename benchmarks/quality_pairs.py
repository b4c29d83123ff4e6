"""Compressors against the two that look at nothing or next to nothing, document by document."""

from __future__ import annotations

from collections.abc import Sequence

from apb.markdown import table
from benchmarks.quality_report import QUANTITIES
from benchmarks.quality_tasks import PROSE, Row
from benchmarks.report import Estimate

_BASELINES = ("random", "knorm")
_PREFIX = "apb-"
_COLUMNS = (("logprob", False, 3), ("correct", False, 2), ("kl", True, 4))
"""Quantity, whether of prose, and digits."""


def render_pairs(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """A section for each baseline and passing length; nothing where no baseline was run."""
    lines: list[str] = []
    for baseline in _BASELINES:
        for method in methods:
            name, _, share = method.partition("@")
            if name != _PREFIX + baseline:
                continue
            others = [
                other
                for other in methods
                if other != method
                and other.startswith(_PREFIX)
                and other.partition("@")[2] == share
            ]
            lines += ["", *_section(rows, method, others)] if others else []
    return lines


def _section(rows: Sequence[Row], baseline: str, others: Sequence[str]) -> list[str]:
    header = ["method", "log-probability, needles", "right answers", "KL to `full`, prose"]
    body = []
    for other in others:
        cells = []
        for quantity, of_prose, digits in _COLUMNS:
            found = _difference(rows, other, baseline, quantity, of_prose=of_prose)
            cells.append("" if found is None else found.text(digits, signed=True))
        body.append([f"`{other}`", *cells])
    return [f"## Minus `{baseline}`, in pairs", "", *table(header, body)]


def _difference(
    rows: Sequence[Row], method: str, baseline: str, quantity: str, *, of_prose: bool
) -> Estimate | None:
    values = {
        (row.method, row.task): float(value)
        for row in rows
        if (row.group == PROSE) is of_prose and (value := QUANTITIES[quantity](row)) is not None
    }
    tasks = [task for name, task in values if name == baseline]
    if not tasks:
        return None
    return Estimate.of([values[method, task] - values[baseline, task] for task in tasks])
