"""From rows to scores per method: of each task, each length and all, and against the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apb.evaluate.intervals import Difference, Estimate, bootstrap, matched, paired, wilson
from apb.evaluate.journal import Place, Row

ALL = "all"
QUANTITIES: Mapping[str, Callable[[Row], float | None]] = {
    "score": lambda row: row.score,
    "logprob": lambda row: row.logprob,
    "kl": lambda row: row.kl,
    "prefill_s": lambda row: row.prefill_s,
    "ttft_s": lambda row: row.ttft_s,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One quantity of one method; `difference` is None for the baseline and without common samples.

    Attributes:
        task, length: which samples; None stands for all of them.
    """

    quantity: str
    method: str
    task: str | None
    length: int | None
    value: Estimate
    difference: Difference | None

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["value"] = self.value._asdict()
        found["difference"] = self.difference and self.difference._asdict()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All entries, and in which order tasks, lengths and methods are shown."""

    methods: list[str]
    tasks: list[str]
    lengths: list[int]
    baseline: str
    entries: list[Entry]

    def find(
        self, quantity: str, method: str, *, task: str | None = None, length: int | None = None
    ) -> Entry | None:
        """None where no sample has that quantity."""
        wanted = (quantity, method, task, length)
        for entry in self.entries:
            if (entry.quantity, entry.method, entry.task, entry.length) == wanted:
                return entry
        return None


def summarise(rows: Sequence[Row], baseline: str, others: Mapping[Place, Row]) -> Summary:
    """Estimates for every group of samples; differences are taken sample by sample."""
    methods = list(dict.fromkeys(row.method for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))
    lengths = sorted({row.length for row in rows})
    groups: list[tuple[str | None, int | None]] = [
        (task, length) for task in (None, *tasks) for length in (None, *lengths)
    ]
    entries = []
    for quantity in QUANTITIES:
        for method in methods:
            for task, length in groups:
                chosen = [
                    row
                    for row in rows
                    if row.method == method
                    and task in (None, row.task)
                    and length in (None, row.length)
                ]
                entry = _entry(quantity, method, chosen, others)
                if entry is not None:
                    value, difference = entry
                    entries.append(
                        Entry(
                            quantity=quantity,
                            method=method,
                            task=task,
                            length=length,
                            value=value,
                            difference=None if method == baseline else difference,
                        )
                    )
    return Summary(
        methods=methods, tasks=tasks, lengths=lengths, baseline=baseline, entries=entries
    )


def _entry(
    quantity: str, method: str, rows: Sequence[Row], others: Mapping[Place, Row]
) -> tuple[Estimate, Difference | None] | None:
    read = QUANTITIES[quantity]
    found = {row.place: value for row in rows if (value := read(row)) is not None}
    if not found:
        return None
    values = list(found.values())
    both = [
        (value, other)
        for place, value in found.items()
        if place in others and (other := read(others[place])) is not None
    ]
    own, between = (wilson, matched) if quantity == "score" else (bootstrap, bootstrap)
    return own(values), paired(*zip(*both, strict=True), interval=between) if both else None
