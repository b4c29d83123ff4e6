"""One request as an HTML page: a single file that needs no network and no script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from apb.trace import bars, heat, timeline
from apb.trace.activity import (
    DECODE,
    PREFILL,
    Activity,
    Slice,
    decoding_steps,
    seconds_by_activity,
    slices_of,
    window,
)
from apb.trace.attention import attended_blocks
from apb.trace.records import SINK_TOKENS, Phase, RankTrace, RunTrace
from apb.trace.svg import amount

_SHOWN_ANSWER = 1200


def render_page(trace: RunTrace, result: dict[str, Any]) -> str:
    """The page; `result` is the request's output as JSON."""
    metrics = result["metrics"]
    slices = [slices_of(part) for part in trace.ranks]
    sections = [
        _request([slices_of(part, coarse=True) for part in trace.ranks]),
        _prefill(trace, slices),
        _decode(trace, slices, metrics),
        _attention(trace, result),
        _memory(trace),
        _ranks(trace, slices, metrics),
    ]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    title = f"{metrics['model']}: {metrics['method']}, {_count(len(trace.ranks), 'rank')}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>\n{style}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            *_head(result),
            *(section for section in sections if section),
            *_footer(trace, metrics),
            "</main></body></html>",
            "",
        ]
    )


def _head(result: dict[str, Any]) -> Iterator[str]:
    metrics, answer = result["metrics"], result["text"].strip()
    lengths = (
        f"{metrics['context_tokens']:,} tokens of context in "
        f"{_count(metrics['num_blocks'], 'block')}, {metrics['query_tokens']} of the question, "
        f"{metrics['generated_tokens']} of the answer (ended by {result['finish_reason']})"
    )
    yield f"<p>{escape(lengths)}</p>"
    shown = answer[:_SHOWN_ANSWER] + ("…" if len(answer) > _SHOWN_ANSWER else "")
    yield f'<p class="answer">{escape(shown)}</p>'
    tiles = {
        "to the first token": amount(metrics["ttft_s"], "s"),
        "reading the document": amount(metrics["prefill_s"], "s"),
        "tokens per second after it": f"{metrics['tokens_per_s']:.1f}",
        "tokens per forward pass": f"{metrics['acceptance_length']:.2f}",
        "received by all ranks": amount(sum(metrics["bytes_exchanged"]), "B"),
        "peak memory of a rank": amount(max(metrics["peak_memory_bytes"]), "B"),
    }
    cells = (
        f"<div class=tile><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items()
    )
    yield f'<div class="tiles">{"".join(cells)}</div>'


def _section(title: str, words: str, *parts: str) -> str:
    return "\n".join(
        [f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>", *parts, "</section>"]
    )


def _legend(activities: Iterable[Activity]) -> str:
    entries = (
        f'<span><i class="{timeline.colour(activity)}"></i>{activity}</span>'
        for activity in activities
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _request(slices: Sequence[Sequence[Slice]]) -> str:
    begin_ns = min((part[0].begin_ns for part in slices if part), default=0)
    end_ns = max((part[-1].end_ns for part in slices if part), default=0)
    present = {each.activity for part in slices for each in part}
    return _section(
        "The request",
        "What each rank did, from taking the request to its last token.",
        _legend(activity for activity in Activity if activity in present),
        timeline.lanes(slices, begin_ns, end_ns, label="What each rank did during the request"),
    )


def _prefill(trace: RunTrace, slices: Sequence[Sequence[Slice]]) -> str:
    windows = [window(part, Phase.PREFILL) for part in trace.ranks]
    begin_ns, end_ns = min(begin for begin, _ in windows), max(end for _, end in windows)
    if begin_ns == end_ns:
        return ""
    seconds = [
        seconds_by_activity(part, *edges) for part, edges in zip(slices, windows, strict=True)
    ]
    parts = [
        _legend(PREFILL),
        timeline.lanes(slices, begin_ns, end_ns, label="What each rank did during prefill"),
        "<p>In total:</p>",
        bars.stacked(seconds, PREFILL, label="Seconds of prefill by rank and activity"),
    ]
    waited = [_waits(part, edges) for part, edges in zip(trace.ranks, windows, strict=True)]
    num_layers = 1 + max((layer for by_layer in waited for layer in by_layer), default=-1)
    if num_layers > 0:
        rows = [[by_layer.get(layer, 0.0) for layer in range(num_layers)] for by_layer in waited]
        parts.append(heat.waits(rows, label="Seconds of waiting by rank and layer"))
    return _section(
        "Reading the document",
        "Prefill, layer by layer; a pixel has the colour of what most of its time went to. "
        "Projections are those of queries, keys, values and outputs. Waiting is for messages of "
        "other ranks, with nothing left to compute meanwhile.",
        *parts,
    )


def _waits(part: RankTrace, edges: tuple[int, int]) -> dict[int, float]:
    """Seconds by layer within a window."""
    begin_ns, end_ns = edges
    seconds: dict[int, float] = defaultdict(float)
    for message in part.messages:
        if begin_ns <= message.waited_from_ns and message.waited_to_ns <= end_ns and message.step:
            seconds[message.layer] += message.waited_s
    return seconds


def _decode(trace: RunTrace, slices: Sequence[Sequence[Slice]], metrics: dict[str, Any]) -> str:
    steps = decoding_steps(trace.ranks[0], slices[0])
    if not steps:
        return ""
    nodes, tokens = sum(step.nodes for step in steps), sum(step.tokens for step in steps)
    legend = _legend(DECODE).removesuffix("</div>")
    keys = (("read", "tokens read, drafts included"), ("emitted", "tokens emitted"))
    legend += "".join(f'<span><i class="{key}"></i>{name}</span>' for key, name in keys)
    return _section(
        "The answer",
        f"{_count(len(steps), 'step')} of rank 0 with drafter {metrics['drafter']}: {nodes} tokens "
        f"read, {tokens} emitted, {tokens / len(steps):.2f} a step.",
        f"{legend}</div>",
        bars.decoding(steps, label="Time, tokens read and tokens emitted by decoding step"),
    )


def _attention(trace: RunTrace, result: dict[str, Any]) -> str:
    found = attended_blocks(trace)
    if found is None or not found.peaks or found.blocks[-1] < 0:
        return ""
    count = min(len(found.peaks), len(result["token_ids"]))
    means = [fmean(column) for column in zip(*found.means[:count], strict=True)]
    start = means[0] if found.blocks[0] < 0 else 0.0
    return _section(
        "What the answer attended to",
        f"Attention probability on each block, of the rows that predicted the first "
        f"{_count(count, 'token')} of the answer, in layers {', '.join(map(str, found.layers))}. "
        "A cell tells what the head gave the block that gave it most: heads that look things up "
        "put nearly all they have on the place that says it. The bars are means over all heads; "
        f"on average {start:.0%} went to the document's first {SINK_TOKENS} tokens, which are in "
        f"no block here, and {max(0.0, 1 - sum(means)):.0%} to question and answer.",
        heat.attended(
            found,
            [*trace.tokens, "end"][:count],
            label="Attention of the answer by block, token and layer",
        ),
    )


def _memory(trace: RunTrace) -> str:
    memory = timeline.curves(
        trace.ranks, lambda sample: sample.memory_bytes, label="Memory of each rank over time"
    )
    received = timeline.curves(
        trace.ranks, lambda sample: sample.received_bytes, label="Bytes received by each rank"
    )
    if not memory:
        return ""
    return _section(
        "Memory and bytes",
        "Memory in use (of CUDA's allocator, or the resident set of a CPU rank), and below it the "
        "bytes received from other ranks, after each layer and step.",
        memory,
        "<p>Received:</p>",
        received,
    )


def _ranks(trace: RunTrace, slices: Sequence[Sequence[Slice]], metrics: dict[str, Any]) -> str:
    header = "rank,host,blocks,tokens run,cached,prefill,of it waiting,received,peak memory,clock"
    rows = []
    for rank, part in enumerate(trace.ranks):
        edges = window(part, Phase.PREFILL)
        seconds = seconds_by_activity(slices[rank], *edges)
        layout = metrics["layout"][rank]
        blocks = " ".join(f"{start}-{stop}" for start, stop in layout["blocks"]) or "none"
        rows.append(
            (
                str(rank),
                part.host,
                blocks,
                f"{layout['tokens_run']:,}",
                f"{layout['tokens_cached']:,}",
                amount((edges[1] - edges[0]) / 1e9, "s"),
                amount(seconds[Activity.WAIT], "s"),
                amount(metrics["bytes_exchanged"][rank], "B"),
                amount(metrics["peak_memory_bytes"][rank], "B"),
                f"± {amount(part.clock_error_ns / 1e9, 's')}"
                if part.clock_error_ns
                else "rank 0's",
            )
        )
    head = "".join(f"<th>{name}</th>" for name in header.split(","))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in metrics["notes"])
    table = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
    return _section("Ranks", "", table, notes)


def _footer(trace: RunTrace, metrics: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    yield "<footer>"
    yield escape(
        f"{metrics['dtype']}, backend {metrics['backend']}, KV {metrics['placement']} while "
        f"decoding, {metrics['device']}; {versions}."
    )
    yield (
        "The .trace.json beside this page holds every event: open it at "
        "<code>https://ui.perfetto.dev</code>.</footer>"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
