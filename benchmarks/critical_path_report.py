"""From the runs of the critical-path benchmark to its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apb.markdown import table
from benchmarks.chart import Bars, Chart
from benchmarks.critical_path_probe import Phase
from benchmarks.critical_path_runs import RankRun, Way, median_run
from benchmarks.critical_path_variants import VARIANTS, Scene
from benchmarks.environment import Environment

MAX_DEVIATION = 0.15
"""By how much a replayed rank's time may differ from the real one's."""

_PHASES = [phase.value for phase in Phase]
_PHASES_TEXT = (
    "`linear` is all that is not attention: linear maps, norms, RoPE. `select` comes before "
    "attention: caching, scoring, gathering and packing what is sent. `local` is attention to the "
    "rank's own keys, `upstream` to those from other ranks, `unpack` lies between them. Under "
    "`ulysses` `select` and `unpack` are the two trades between rows and heads."
)


def render(
    runs: Sequence[RankRun], environment: Environment, scene: Scene, settings: Mapping[str, Any]
) -> list[str]:
    """The report in Markdown."""
    lines = [
        f"# Critical path of a prefill on {scene.ranks} ranks, {scene.model}, {scene.dtype}",
        "",
        *environment.lines(),
        *_scene_lines(scene, settings),
        f"* before anything was timed: {settings['gate']}",
        f"* repeats: {settings['repeats']} after {settings['warm_ups']} to warm up, variants "
        "alternating; median (smallest to largest), phases from the run in the middle",
        "",
        "Each rank ran alone on one device, with random tensors in place of the other ranks' "
        "messages. Not in these times: that ranks wait for one another where their layers differ "
        "in length (about a layer, once), and what a machine that runs all ranks at once takes "
        "from each. A transfer is modelled from the figures of the link, in the busier direction; "
        "it is exposed as far as it exceeds what the rank does between starting the exchange and "
        "waiting for it. Total is all phases and the exposed transfer.",
        "",
        _PHASES_TEXT,
        "",
        *(f"* `{name}`: {VARIANTS[name].title}" for name in settings["methods"]),
    ]
    for context_len in dict.fromkeys(run.context_len for run in runs):
        own = [run for run in runs if run.context_len == context_len]
        lines += [
            "",
            f"## {context_len} tokens: the slowest of the ranks that were run, seconds",
            "",
            *_slowest(own),
            "",
            f"## {context_len} tokens: every rank that was run",
            "",
            *_ranks(own),
        ]
    return lines


def render_validation(
    runs: Sequence[RankRun], environment: Environment, scene: Scene, settings: Mapping[str, Any]
) -> list[str]:
    """The report on whether replayed ranks take as long as real ones, in Markdown."""
    return [
        f"# Replayed ranks beside real ones, {scene.model}, {scene.dtype}",
        "",
        *environment.lines(),
        *_scene_lines(scene, settings),
        f"* {settings['context'][0]} tokens on {scene.ranks} ranks; repeats: "
        f"{settings['repeats']} after {settings['warm_ups']} to warm up, ways alternating; median "
        "(smallest to largest), phases from the run in the middle",
        "",
        f"`real`: processes that exchange over gloo, all {scene.shape.num_layers} layers; time "
        "spent waiting for another rank is part of `unpack`. `alone`: one rank is replayed while "
        "the others do nothing, as the benchmark does. `together`: all ranks are replayed at the "
        "same time, which shares the machine as reality does but exchanges nothing. Replayed "
        f"ranks run {scene.layers} layers, and their totals contain the modelled transfer as far "
        "as it is exposed.",
        "",
        *_comparison(runs),
        "",
        _PHASES_TEXT,
        "",
        "## Slowest rank",
        "",
        f"Seconds replayed alone over real ones; the bar is {MAX_DEVIATION:.0%} either way.",
        "",
        *(
            f"* `{name}`: {ratio:.2f}, {'within' if abs(ratio - 1) <= MAX_DEVIATION else 'OUTSIDE'}"
            for name, ratio in deviations(runs).items()
        ),
    ]


def deviations(runs: Sequence[RankRun]) -> dict[str, float]:
    """For each variant, the slowest rank's seconds when replayed alone, over the real ones."""
    alone, real = (
        _by_variant([run for run in runs if run.way is way]) for way in (Way.alone, Way.real)
    )
    return {
        name: _critical(alone[name]).total_s / _critical(own).total_s for name, own in real.items()
    }


def _scene_lines(scene: Scene, settings: Mapping[str, Any]) -> list[str]:
    rates, shape = scene.rates, scene.shape
    return [
        f"* model: {shape.num_layers} layers of hidden size {shape.hidden_size}, intermediate "
        f"{shape.intermediate_size}, {shape.num_heads} heads, {shape.num_kv_heads} KV heads of "
        f"{shape.head_dim}; random weights; {scene.layers} layers are run and the others counted "
        "at their mean",
        f"* prompt: random tokens, a question of {scene.question_len}; overrides: "
        f"`{' '.join(scene.overrides) or 'none'}`; threads: {settings['threads']}",
        f"* rates by which `balanced` plans and ranks are predicted: linear maps "
        f"{rates.linear_flops / 1e12:.3g} and attention {rates.attention_flops / 1e12:.3g} TFLOP/s "
        f"({rates.source})",
        f"* link: {rates.link_bytes / 1e9:g} GB/s each way, {rates.latency_s * 1e6:g} us",
    ]


def _slowest(runs: Sequence[RankRun]) -> list[str]:
    slowest = {name: _critical(own) for name, own in _by_variant(runs).items()}
    rows = []
    for name, run in slowest.items():
        same = [r for r in runs if (r.variant, r.rank) == (name, run.rank)]
        ratio = f"{run.total_s / slowest['apb'].total_s:.2f}" if "apb" in slowest else "-"
        rows.append([f"`{name}` rank {run.rank}", *_parts(run), _total(same), ratio])
    header = ["variant, slowest rank", *_PHASES, "transfer", "exposed", "total", "total / `apb`"]
    return table(header, rows)


def chart(runs: Sequence[RankRun]) -> Chart:
    """What the slowest rank's time goes to, at the longest context."""
    longest = max(run.context_len for run in runs)
    of_length = [run for run in runs if run.context_len == longest]
    slowest = {name: _critical(own) for name, own in _by_variant(of_length).items()}
    return Bars(
        title=f"The slowest rank of a prefill of {longest} tokens",
        y_label="seconds",
        groups={
            name: {**run.phases_s, "exposed transfer": run.exposed_s}
            for name, run in slowest.items()
        },
        stacked=True,
    )


def _ranks(runs: Sequence[RankRun]) -> list[str]:
    rows = []
    for name, own in _by_variant(runs).items():
        for rank in sorted({run.rank for run in own}):
            run = median_run([r for r in own if r.rank == rank])
            rows.append(
                [
                    f"`{name}` rank {rank}",
                    str(run.work.rows),
                    f"{run.work.head_pairs / 1e9:.3g}",
                    f"{run.work.received_bytes / 2**20:.1f}",
                    *_parts(run),
                    f"{run.total_s:.3f}",
                    f"{run.predicted_s:.3f}",
                ]
            )
    header = ["variant, rank", "rows", "G pairs / layer", "MiB in / layer"]
    return table([*header, *_PHASES, "transfer", "exposed", "total", "predicted"], rows)


def _comparison(runs: Sequence[RankRun]) -> list[str]:
    rows = []
    for name, own in _by_variant(runs).items():
        for rank in sorted({run.rank for run in own}):
            ways = {way: [r for r in own if (r.rank, r.way) == (rank, way)] for way in Way}
            real_s = median_run(ways[Way.real]).total_s
            for way, some in ways.items():
                run = median_run(some)
                ratio = f"{run.total_s / real_s:.2f}"
                rows.append(
                    [f"`{name}` rank {rank} {way.value}", *_parts(run), _total(some), ratio]
                )
    header = ["variant, rank", *_PHASES, "transfer", "exposed", "total", "total / real"]
    return table(header, rows)


def _by_variant(runs: Sequence[RankRun]) -> dict[str, list[RankRun]]:
    names = dict.fromkeys(run.variant for run in runs)
    return {name: [run for run in runs if run.variant == name] for name in names}


def _critical(runs: Sequence[RankRun]) -> RankRun:
    """The median run of the rank that takes longest."""
    ranks = {run.rank for run in runs}
    medians = [median_run([run for run in runs if run.rank == rank]) for rank in sorted(ranks)]
    return max(medians, key=lambda run: run.total_s)


def _parts(run: RankRun) -> list[str]:
    seconds = [*(run.phases_s[name] for name in _PHASES), run.transfer_s, run.exposed_s]
    return [f"{second:.3f}" for second in seconds]


def _total(runs: Sequence[RankRun]) -> str:
    """Of the run in the middle, with the smallest and the largest."""
    totals = [run.total_s for run in runs]
    return f"{median_run(runs).total_s:.3f} ({min(totals):.3f} to {max(totals):.3f})"
