"""From the rows of the quality benchmark to its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apb.markdown import table
from apb.plot import Interval
from benchmarks.chart import Bars, Chart
from benchmarks.environment import Environment
from benchmarks.quality_lab import REFERENCE
from benchmarks.quality_tasks import CONTINUATION_LEN, MAX_ANSWER_TOKENS, PROSE, Row
from benchmarks.report import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One quantity of one method on one group of tasks, and task by task against the reference."""

    method: str
    quantity: str
    group: str
    count: int
    value: Estimate
    difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All scores, and the names of the passages behind those of prose."""

    methods: list[str]
    groups: list[str]
    scores: list[Score]
    passages: list[str]

    def of(self, method: str, quantity: str, group: str) -> Score:
        wanted = (method, quantity, group)
        return next(s for s in self.scores if (s.method, s.quantity, s.group) == wanted)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


QUANTITIES: Mapping[str, Callable[[Row], float | bool | None]] = {
    "correct": lambda row: row.correct,
    "logprob": lambda row: row.logprob,
    "kl": lambda row: row.kl,
    "prefill_s": lambda row: row.prefill_s,
}


def summarise(rows: Sequence[Row], methods: Sequence[str]) -> Summary:
    """Scores per method: each kind of needle, each length, all needles, and prose."""
    groups: dict[str, Callable[[Row], bool]] = {
        **{kind: _is_kind(kind) for kind in dict.fromkeys(row.group for row in rows)},
        **{
            f"{length} tokens": _has_length(length)
            for length in sorted({row.length for row in rows if row.group != PROSE})
        },
        "needles": lambda row: row.group != PROSE,
    }
    scores = []
    for group, member in groups.items():
        for quantity, read in QUANTITIES.items():
            values = {
                (row.method, row.task): float(value)
                for row in rows
                if member(row) and (value := read(row)) is not None
            }
            tasks = list(dict.fromkeys(task for _, task in values))
            if not tasks:
                continue
            for method in methods:
                own = [values[method, task] for task in tasks]
                pairs = [values[method, task] - values[REFERENCE, task] for task in tasks]
                scores.append(
                    Score(
                        method=method,
                        quantity=quantity,
                        group=group,
                        count=len(tasks),
                        value=Estimate.of(own),
                        difference=Estimate.of(pairs),
                    )
                )
    passages = list(dict.fromkeys(row.task for row in rows if row.group == PROSE))
    return Summary(methods=list(methods), groups=list(groups), scores=scores, passages=passages)


def render(summary: Summary, environment: Environment, settings: Mapping[str, Any]) -> list[str]:
    """The report in Markdown."""
    lines = [
        f"# Quality of {settings['model']} by prefill method",
        "",
        *environment.lines(),
        f"* {settings['blocks']} blocks for every method but `full`, one rank, "
        f"{settings['threads']} threads, overrides `{' '.join(settings['overrides'])}`",
        *(f"* `{name}`: `{config}`" for name, config in settings["methods"].items()),
        "",
        "± is the standard error of the mean over documents. Differences are method minus `full` "
        "on the same documents, so that what makes a document easy or hard cancels out; one below "
        "twice its standard error shows nothing.",
    ]
    needle_groups = [group for group in summary.groups if group != PROSE]
    if "needles" in {score.group for score in summary.scores}:
        lines += [
            "",
            "## Generated questions",
            "",
            f"Right answers among greedy ones of at most {MAX_ANSWER_TOKENS} tokens:",
            "",
            *_grid(summary, "correct", needle_groups, 2),
            "",
            "Log-probability per token of the right answer (the model is forced to say it), which "
            "also ranks methods where the model answers wrongly:",
            "",
            *_grid(summary, "logprob", needle_groups, 3),
            "",
            "Mean prefill seconds (one rank runs all blocks; not a benchmark of speed):",
            "",
            *_grid(summary, "prefill_s", needle_groups, 2, difference=False),
        ]
    if summary.passages:
        names = ", ".join(summary.passages)
        lines += [
            "",
            "## Prose",
            "",
            f"The next {CONTINUATION_LEN} tokens of real texts, without a query. Texts and their "
            f"context tokens: {names}. They come with Python (`pydoc_data.topics`) and with "
            "installed packages (their licences); a model may know a licence by heart.",
            "",
            *_prose(summary),
        ]
    return lines


def chart(summary: Summary, model: str) -> Chart:
    """What methods lose against the reference, in log-probability of right answers."""
    scores = [
        score
        for score in summary.scores
        if score.quantity == "logprob" and score.method != REFERENCE
    ]
    groups: dict[str, dict[str, Interval | float]] = {}
    for score in scores:
        name, _, share = score.method.partition("@")
        if not share:
            groups.setdefault(score.group, {})[name] = score.difference.interval()
        elif score.group == "needles":  # compressors by how much they may keep
            passing = f"passing {share} of a block"
            groups.setdefault(name.removeprefix("apb-"), {})[passing] = score.difference.interval()
    return Bars(
        title=f"Log-probability per token of {model}",
        y_label=f"method minus {REFERENCE}, nats",
        groups=groups,
    )


def _is_kind(kind: str) -> Callable[[Row], bool]:
    return lambda row: row.group == kind


def _has_length(length: int) -> Callable[[Row], bool]:
    return lambda row: row.group != PROSE and row.length == length


def _grid(
    summary: Summary, quantity: str, groups: Sequence[str], digits: int, *, difference: bool = True
) -> list[str]:
    """Methods down, groups across, and the difference to the reference over all needles."""
    counts = [summary.of(REFERENCE, quantity, group).count for group in groups]
    titles = [f"{group} (n={count})" for group, count in zip(groups, counts, strict=True)]
    rows = []
    for method in summary.methods:
        scores = [summary.of(method, quantity, group) for group in groups]
        cells = [score.value.text(digits) for score in scores]
        if difference:
            cells.append(_difference(scores[-1], digits))
        rows.append([f"`{method}`", *cells])
    return table(["method", *titles, *["all, minus full"] * difference], rows)


def _prose(summary: Summary) -> list[str]:
    rows = []
    for method in summary.methods:
        logprob, kl = (summary.of(method, quantity, PROSE) for quantity in ("logprob", "kl"))
        seconds = summary.of(method, "prefill_s", PROSE)
        rows.append(
            [
                f"`{method}`",
                logprob.value.text(3),
                _difference(logprob, 4),
                kl.value.text(4),
                f"{seconds.value.mean:.2f}",
            ]
        )
    header = ["method", "log-probability per token", "minus full", "KL(full ‖ method)", "prefill s"]
    return table(header, rows)


def _difference(score: Score, digits: int) -> str:
    return "" if score.method == REFERENCE else score.difference.text(digits, signed=True)
