"""An evaluation in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta

from apb.evaluate.intervals import Difference, Estimate
from apb.evaluate.journal import Row
from apb.evaluate.prose import PASSAGES
from apb.evaluate.settings import Settings
from apb.evaluate.summary import Entry, Summary
from apb.evaluate.tasks import PROSE
from apb.markdown import table
from apb.report import installed_versions


def render(summary: Summary, settings: Settings, rows: Sequence[Row]) -> list[str]:
    """The whole report about rows, which `summary` sums up."""
    return [
        f"# Evaluation of {settings.config.model.name}",
        "",
        *_facts(summary, settings, rows),
        *_scores(summary),
        *_differences(summary),
        *_prose(summary),
        *_times(summary),
    ]


def _facts(summary: Summary, settings: Settings, rows: Sequence[Row]) -> Iterator[str]:
    versions = ", ".join(map(" ".join, installed_versions().items()))
    yield f"* command: `{settings.command}`"
    timed = [row.seconds for row in rows if row.seconds is not None]
    yield f"* {len(timed)} rows took {timedelta(seconds=round(sum(timed)))}, starts of ranks aside"
    prose = min(settings.samples, len(PASSAGES)) if PROSE in settings.tasks else 0
    fewer = f" ({prose} of {PROSE})" if 0 < prose < settings.samples else ""
    yield f"* {settings.samples} samples of each task at each length{fewer}; {versions}"
    # More than one of each where a folder was filled in several goes.
    for what, origins in (
        ("ran in", [row.ran for row in rows]),
        ("by apb at commit", [row.source for row in rows]),
    ):
        counts = Counter(origin for origin in origins if origin is not None)
        if counts:
            found = (f"{origin} ({count} rows)" for origin, count in counts.items())
            yield f"* {what} {', '.join(found)}"
    for label, overrides in settings.methods.items():
        yield f"* `{label}`: `{' '.join(overrides)}`"
    yield (
        "* Brackets hold 95 % intervals: of scores by Wilson and of their differences by Agresti "
        "and Min, of all else by a percentile bootstrap. Differences are taken sample by sample "
        f"against `{summary.baseline}`; p is that of a two-sided sign test over the samples that "
        "differ."
    )


def _scores(summary: Summary) -> Iterator[str]:
    tasks = [task for task in summary.tasks if _has(summary, "score", task)]
    if not tasks:
        return
    lengths = [length for length in summary.lengths if _has(summary, "score", None, length)]
    yield from ("", "## Scores", "", "Mean over all tasks, in per cent:", "")
    header = ["method", *(f"{length} tokens" for length in lengths), "all"]
    yield from table(
        header,
        [
            [
                f"`{method}`",
                *(
                    _percent(summary.find("score", method, length=length))
                    for length in [*lengths, None]
                ),
            ]
            for method in summary.methods
        ],
    )
    yield from ("", "By task, in per cent:", "")
    rows = [
        [task, f"{length}"]
        + [
            _percent(summary.find("score", method, task=task, length=length))
            for method in summary.methods
        ]
        for task in tasks
        for length in lengths
        if _has(summary, "score", task, length)
    ]
    yield from table(["task", "tokens", *(f"`{method}`" for method in summary.methods)], rows)


def _differences(summary: Summary) -> Iterator[str]:
    rows = [
        [f"`{method}`", group, *_compared(entry.difference, 100, 1)]
        for method in summary.methods
        for group, entry in _groups(summary, method)
        if entry.difference is not None
    ]
    if rows:
        yield from ("", f"## Against `{summary.baseline}`", "", "Scores, in per cent:", "")
        yield from table(["method", "samples of", "difference", "better", "worse", "p"], rows)


def _groups(summary: Summary, method: str) -> Iterator[tuple[str, Entry]]:
    overall = summary.find("score", method)
    if overall is not None:
        yield "all tasks and lengths", overall
    for length in summary.lengths if len(summary.lengths) > 1 else ():
        entry = summary.find("score", method, length=length)
        if entry is not None:
            yield f"{length} tokens", entry
    for task in summary.tasks if len(summary.tasks) > 1 else ():
        entry = summary.find("score", method, task=task)
        if entry is not None:
            yield task, entry


def _prose(summary: Summary) -> Iterator[str]:
    rows = []
    for method in summary.methods:
        for length in summary.lengths:
            logprob = summary.find("logprob", method, length=length)
            kl = summary.find("kl", method, length=length)
            if logprob is None or kl is None:
                continue
            difference = _compared(logprob.difference, 1, 4)[0] if logprob.difference else ""
            rows.append(
                [
                    f"`{method}`",
                    f"{length}",
                    _interval(logprob.value, 1, 3),
                    difference,
                    _interval(kl.value, 1, 4),
                ]
            )
    if rows:
        yield from ("", "## Real prose", "", "Nats per token of the text that follows:", "")
        header = ["method", "tokens", "log-probability", f"minus `{summary.baseline}`"]
        yield from table([*header, "KL(exact ‖ method)"], rows)


def _times(summary: Summary) -> Iterator[str]:
    rows = [
        [f"`{method}`", f"{length}", _interval(prefill.value, 1, 2), _interval(first.value, 1, 2)]
        for method in summary.methods
        for length in summary.lengths
        if (prefill := summary.find("prefill_s", method, length=length)) is not None
        and (first := summary.find("ttft_s", method, length=length)) is not None
    ]
    if rows:
        yield from ("", "## Seconds", "", "Means over samples, as they came:", "")
        yield from table(["method", "tokens", "prefill", "to the first token"], rows)


def _has(summary: Summary, quantity: str, task: str | None, length: int | None = None) -> bool:
    return any(
        summary.find(quantity, method, task=task, length=length) for method in summary.methods
    )


def _percent(entry: Entry | None) -> str:
    return "" if entry is None else _interval(entry.value, 100, 1)


def _interval(value: Estimate, scale: float, digits: int) -> str:
    mean, low, high = (f"{scale * part:.{digits}f}" for part in value[1:4])
    return f"{mean} [{low}, {high}]"


def _compared(difference: Difference | None, scale: float, digits: int) -> list[str]:
    assert difference is not None, "the baseline is not compared with itself"
    mean, low, high = (f"{scale * part:+.{digits}f}" for part in difference[1:4])
    wins, losses = f"{difference.wins}", f"{difference.losses}"
    p = "<0.001" if difference.p < 0.0005 else f"{difference.p:.3f}"
    return [f"{mean} [{low}, {high}]", wins, losses, p]
