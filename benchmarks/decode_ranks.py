"""Decoding over KV that is spread over ranks: how much of a step goes to the exchange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from apb import LLM, SamplingParams
from apb.markdown import table
from apb.output import RequestOutput
from apb.trace.records import Phase, Span
from benchmarks.decode_tasks import Task

RANKS = 2
SAMPLES = 2
"""Prompts of each category."""
_OVERRIDES = (
    *("method=zigzag", "decode.placement=sharded", "model.template=raw", "trace=true"),
    "progress=false",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadRun:
    """One answer over several ranks; seconds of rank 0 over all of its decoding steps."""

    drafter: str
    category: str
    task: str
    steps: int
    tokens: int
    nodes: int
    draft_s: float
    exchange_s: float
    """Waiting for messages of other ranks, who may be slower."""
    step_s: float


def spread_runs(
    overrides: Sequence[str], tasks: Sequence[Task], drafters: Sequence[str], *, max_tokens: int
) -> Iterator[SpreadRun]:
    """The first prompts of each category, answered with each of the drafters."""
    grouped = groupby(tasks, key=lambda task: task.category)
    chosen = [task for _, group in grouped for task in list(group)[:SAMPLES]]
    common = [*overrides, f"world_size={RANKS}", *_OVERRIDES]
    with LLM.from_overrides([*common, f"drafter={drafters[0]}"]) as llm:
        for drafter in drafters:
            llm.configure([*common, f"drafter={drafter}"])
            for task in chosen:
                out = llm.ask(
                    task.context_ids, task.query_ids, SamplingParams(max_tokens=max_tokens)
                )
                yield _of(out, task, drafter)


def _of(out: RequestOutput, task: Task, drafter: str) -> SpreadRun:
    assert out.trace is not None, "trace=true"
    owner = out.trace.ranks[0]
    steps = [span for span in owner.spans if span.phase is Phase.STEP]
    waits = [
        message.waited_s
        for message in owner.messages
        if any(_within(message.waited_from_ns, step) for step in steps)
    ]
    return SpreadRun(
        drafter=drafter,
        category=task.category,
        task=task.name,
        steps=len(steps),
        tokens=sum(step.detail["tokens"] for step in steps),
        nodes=sum(step.detail["nodes"] for step in steps),
        draft_s=out.metrics.draft_s,
        exchange_s=sum(waits),
        step_s=sum(step.seconds for step in steps),
    )


def _within(time_ns: int, span: Span) -> bool:
    return span.begin_ns <= time_ns < span.end_ns


def render_spread(runs: Sequence[SpreadRun]) -> list[str]:
    """A section; times are per step."""
    rows = []
    categories = list(dict.fromkeys(run.category for run in runs))
    ordered = sorted(runs, key=lambda run: categories.index(run.category))
    for key, group in groupby(ordered, key=lambda run: (run.category, run.drafter)):
        own = list(group)
        steps = sum(run.steps for run in own)
        if not steps:
            continue
        rows.append(
            [
                f"{key[0]}, `{key[1]}`",
                f"{sum(run.tokens for run in own) / steps:.2f}",
                f"{sum(run.nodes for run in own) / steps:.1f}",
                *(
                    f"{1e3 * sum(getattr(run, name) for run in own) / steps:.1f}"
                    for name in ("step_s", "draft_s", "exchange_s")
                ),
            ]
        )
    header = ["", "acceptance", "nodes", "step ms", "draft ms", "exchange ms"]
    return [
        f"## Over {RANKS} ranks",
        "",
        f"KV stays where it was read (`method=zigzag decode.placement=sharded`), {SAMPLES} prompts "
        "of each category, ranks of this machine with a share of its threads each. `exchange` is "
        "what rank 0 waits for messages, the other rank's slower passes included; times are per "
        "step, tracing included.",
        "",
        *table(header, rows),
    ]
