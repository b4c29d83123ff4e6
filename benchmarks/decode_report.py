"""The report of `benchmarks.decode`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apb.markdown import table
from apb.plot import Interval
from benchmarks.chart import Bars, Chart
from benchmarks.decode_runs import HF_LOOKUP_TOKENS, Run
from benchmarks.environment import Environment
from benchmarks.report import Estimate


def render(
    runs: Sequence[Run], environment: Environment, settings: Mapping[str, Any], *, plain: str
) -> list[str]:
    categories = list(dict.fromkeys(run.category for run in runs))
    lines = [
        f"# Decoding, {settings['model']}, {settings['dtype']}, greedy",
        "",
        *environment.lines(),
        f"* {settings['threads']} threads, one rank, method=full; {settings['max_tokens']} tokens "
        "each at most",
        f"* prompts: {settings['samples']} of each Spec-Bench category "
        f"(`{settings['spec_bench']}`), {settings['quoting']} documents of up to "
        f"{settings['document_chars']} characters with a letter in them that is to be quoted (the "
        "answer begins with what introduces the letter)",
        "* drafters gave the same tokens (but for near ties of logits); Hugging Face gave "
        f"{_agreement(runs, plain)} answers with the same tokens",
        f"* `hf-lookup`: `generate` with `prompt_lookup_num_tokens={HF_LOOKUP_TOKENS}`",
        "",
        "Tokens a second count the tokens behind the first. The speed-up is the mean over prompts "
        "of tokens a second over those of plain decoding (`none`), ± its standard error. "
        "Acceptance is tokens emitted per forward pass; nodes are tokens read per pass, drafts "
        "included; times are per pass.",
    ]
    for category in categories:
        of_category = [run for run in runs if run.category == category]
        lines += ["", f"## {category}", "", *_table(of_category, plain)]
    return lines + _trimming(runs, categories)


def _trimming(runs: Sequence[Run], categories: Sequence[str]) -> list[str]:
    """What the trimmed vocabulary is worth: the same head with all tokens beside it."""
    by_task = {(run.variant, run.task): run for run in runs}
    rows = []
    for category in categories:
        tasks = [r.task for r in runs if (r.category, r.variant) == (category, "frspec")]
        whole = {task: by_task["eagle", task] for task in tasks if ("eagle", task) in by_task}
        trimmed = [by_task["frspec", task] for task in whole]
        ratio = _speed_up(trimmed, whole)
        if ratio is None:
            return []
        acceptance = _acceptance(trimmed) / _acceptance([*whole.values()])
        rows.append([category, ratio.text(2), f"{acceptance:.0%}"])
    header = [
        "category",
        "tokens/s of `frspec` over `eagle`",
        "acceptance of `frspec` over `eagle`",
    ]
    return ["", "## The frequent tokens alone against all tokens", "", *table(header, rows)]


def _speed_up(runs: Sequence[Run], base: Mapping[str, Run]) -> Estimate | None:
    """Over the runs of the same tasks in `base`, as far as these have a rate."""
    ratios = [run.rate / base[run.task].rate for run in runs if base[run.task].rate]
    return Estimate.of(ratios) if ratios else None


def _acceptance(runs: Sequence[Run]) -> float:
    return sum(run.tokens for run in runs) / sum(run.steps or 0 for run in runs)


def _table(runs: Sequence[Run], plain: str) -> list[str]:
    base = {run.task: run for run in runs if run.variant == plain}
    rows = []
    for variant in dict.fromkeys(sorted(run.variant for run in runs)):
        own = [run for run in runs if run.variant == variant]
        seconds, tokens = sum(run.seconds for run in own), sum(run.tokens for run in own)
        found = _speed_up(own, base)
        rate = f"{tokens / seconds:.1f}" if seconds else ""
        row = [f"`{variant}`", rate, found.text(2) if found else ""]
        rows.append([*row, *_per_step(own)])
    header = ["drafter", "tokens/s", "speed-up", "acceptance", "nodes", "draft ms", "verify ms"]
    return table(header, rows)


def chart(runs: Sequence[Run], model: str, *, plain: str) -> Chart:
    """Tokens a second over those of plain decoding, by category."""
    base = {run.task: run for run in runs if run.variant == plain}
    groups: dict[str, dict[str, Interval | float]] = {}
    for run in runs:
        if run.variant != plain:
            groups.setdefault(run.category, {})[run.variant] = 0.0
    for category, bars in groups.items():
        for variant in bars:
            own = [run for run in runs if (run.category, run.variant) == (category, variant)]
            found = _speed_up(own, base)
            bars[variant] = found.interval() if found else 0.0
    return Bars(title=f"Decoding of {model}", y_label="tokens/s over plain decoding", groups=groups)


def _per_step(runs: Sequence[Run]) -> list[str]:
    steps = sum(run.steps or 0 for run in runs)
    if not steps:
        return [""] * 4
    seconds, draft_s = sum(run.seconds for run in runs), sum(run.draft_s or 0 for run in runs)
    return [
        f"{_acceptance(runs):.2f}",
        f"{sum(run.nodes or 0 for run in runs) / steps:.1f}",
        f"{1e3 * draft_s / steps:.2f}",
        f"{1e3 * (seconds - draft_s) / steps:.1f}",
    ]


def _agreement(runs: Sequence[Run], plain: str) -> str:
    expected = {run.task: run.token_ids for run in runs if run.variant == plain}
    same = [run.token_ids == expected[run.task] for run in runs if run.variant == "hf"]
    return f"{sum(same)} of {len(same)}"
