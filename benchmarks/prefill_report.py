"""From the runs of the prefill benchmark to its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apb.markdown import table
from benchmarks.chart import Chart, Lines
from benchmarks.environment import Environment
from benchmarks.memory import RankMemory, Sizes
from benchmarks.prefill_runs import Run, Variant
from benchmarks.report import Spread

_MAX_EXCESS = 0.15
_MAX_LOAD_S = 15.0


def render(
    runs: Sequence[Run],
    variants: Sequence[Variant],
    environment: Environment,
    settings: Mapping[str, Any],
) -> list[str]:
    """The report in Markdown."""
    lengths = list(dict.fromkeys(run.length for run in runs))
    beyond = [str(length) for length in lengths if length > settings["max_positions"]]
    lines = [
        f"# Prefill of {settings['model']}, {settings['dtype']}",
        "",
        *environment.lines(),
        f"* overrides: `{' '.join(settings['override']) or 'none'}`; documents of random tokens",
        f"* before anything was timed, method=full and Hugging Face in fp32 differed by at most "
        f"{settings['gate']:.1e} in log-probability (limit 1e-3)",
        f"* repeats, for all lengths or one number each: {str(settings['repeats'])[1:-1]}; "
        "in fresh processes after a short warm-up prompt; median (smallest to largest)",
    ]
    if beyond:
        lines.append(
            f"* {', '.join(beyond)} tokens exceed the model's {settings['max_positions']} "
            "positions: these rows say something about speed and memory, nothing about answers"
        )
    lines += [
        "",
        "## Speed",
        "",
        "The speed-up compares the seconds to the logits of the first new token with those of the "
        "unchanged Hugging Face model, as its prefill includes the question and apb's does not.",
        "",
        *_speed(runs, variants, lengths),
        "",
    ]
    if any(variant.name == "hf-wide" for variant in variants):
        lines += [
            "This processor multiplies 16-bit matrices slowly, and apb's `WideLinears` does so in "
            "fp32. What `hf-wide` gains over `hf` is due to that alone, what `apb` gains over "
            "`hf-wide` to the method, the ranks and the attention.",
            "",
        ]
    lines += [
        *(
            f"* `{variant.name}`: {variant.title}, {variant.ranks} x {variant.threads} threads"
            for variant in variants
        ),
        "",
        "## Memory",
        "",
        "Peak resident set in MiB while the prompt was read, beside its parts: the process before "
        "any weight was read, the weights (memory-mapped, so that ranks of one machine share them, "
        "but counted for each; a rank that computes no logits never touches all of them), the "
        "rank's share of the KV cache, and one layer's activations of the tokens it runs "
        f"({Sizes.FORMULA}). Excess is what the peak has beyond them, in "
        f"percent of weights + KV + activations; the bar is {_MAX_EXCESS:.0%}. The repeat with "
        "the highest peak is shown.",
        "",
        *_memory(runs, variants, lengths),
        "",
        "## Loading",
        "",
        f"Seconds from starting the processes to being ready; the bar is {_MAX_LOAD_S:.0f} s.",
        "",
        *_loading(runs, variants),
    ]
    return lines


def chart(runs: Sequence[Run], variants: Sequence[Variant], model: str) -> Chart:
    """Seconds to the first token by length."""
    lengths = list(dict.fromkeys(run.length for run in runs))
    return Lines(
        title=f"Prefill of {model}",
        x_label="document tokens",
        y_label="seconds to the first token",
        series={
            variant.name: [
                (length, Spread.of([r.first_token_s for r in _of(runs, variant, length)]).median)
                for length in lengths
            ]
            for variant in variants
        },
    )


def _speed(runs: Sequence[Run], variants: Sequence[Variant], lengths: Sequence[int]) -> list[str]:
    rows = []
    for length in lengths:
        baseline = Spread.of([r.first_token_s for r in _of(runs, variants[0], length)]).median
        for variant in variants:
            own = _of(runs, variant, length)
            first = Spread.of([run.first_token_s for run in own])
            rows.append(
                [
                    f"{length} `{variant.name}`",
                    Spread.of([run.prefill_s for run in own]).text(),
                    first.text(),
                    f"{baseline / first.median:.2f}",
                ]
            )
    return table(["tokens, variant", "prefill s", "first token s", "speed-up"], rows)


def _memory(runs: Sequence[Run], variants: Sequence[Variant], lengths: Sequence[int]) -> list[str]:
    rows = []
    for length in lengths:
        for variant in variants:
            own = _of(runs, variant, length)
            for rank in range(variant.ranks):
                worst = max((run.memory[rank] for run in own), key=lambda memory: memory.peak)
                rows.append([f"{length} `{variant.name}` rank {rank}", *_parts(worst)])
    header = ["tokens, variant, rank", "peak", "process", "weights", "KV", "activations", "excess"]
    return table(header, rows)


def _parts(memory: RankMemory) -> list[str]:
    parts = (memory.peak, memory.baseline, memory.weights, memory.kv, memory.activations)
    return [*(f"{part / 2**20:.0f}" for part in parts), f"{memory.excess:+.0%}"]


def _loading(runs: Sequence[Run], variants: Sequence[Variant]) -> list[str]:
    rows = []
    for variant in variants:
        seconds = Spread.of([run.load_s for run in runs if run.variant == variant.name])
        rows.append([f"`{variant.name}`", seconds.text()])
    return table(["variant", "load s"], rows)


def _of(runs: Sequence[Run], variant: Variant, length: int) -> list[Run]:
    return [run for run in runs if run.variant == variant.name and run.length == length]
