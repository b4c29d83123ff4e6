"""A trace in Chrome's Trace Event format, which Perfetto and chrome://tracing open.

Ranks are processes. A rank's phases are complete events on one thread and nest as they ran; the
waits for messages are on it as well. Messages are asynchronous events from when they were posted
until they had arrived, with an arrow from each sender of passing blocks or shards to whoever waited
for them. Memory and received bytes are counters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from apb.trace.records import Message, RankTrace, RunTrace, Span

Event = dict[str, Any]
_PHASES, _WIRE = 1, 2
_POINT_TO_POINT = ("upstream", "shard")
"""Messages of which each layer of a forward pass has one, from certain ranks to certain others."""


def chrome_trace(trace: RunTrace, result: dict[str, Any]) -> dict[str, Any]:
    """The JSON object form of the format; `result` says what ran."""
    events = [event for rank, part in enumerate(trace.ranks) for event in _rank_events(rank, part)]
    return {
        "traceEvents": [*events, *_arrows(trace.ranks)],
        "displayTimeUnit": "ms",
        "otherData": {
            "clock": "rank 0's monotonic clock; 0 is when the first rank took the request",
            "clock_error_us": [part.clock_error_ns / 1e3 for part in trace.ranks],
            "finish_reason": result["finish_reason"],
            "metrics": result["metrics"],
        },
    }


def _rank_events(rank: int, part: RankTrace) -> Iterator[Event]:
    name = f"rank {rank} ({part.host}, {part.device})"
    yield _named("process_name", rank, name=name)
    yield _named("process_sort_index", rank, sort_index=rank)
    yield _named("thread_name", rank, _PHASES, name="phases")
    yield _named("thread_name", rank, _WIRE, name="messages")
    for span in part.spans:
        yield _phase(rank, span)
    for index, message in enumerate(part.messages):
        yield _wait(rank, message)
        yield from _transfer(rank, message, identity=f"{rank}.{index}")
    for sample in part.samples:
        counters = {"memory": sample.memory_bytes, "received": sample.received_bytes}
        for counter, value in counters.items():
            args = {"bytes": value}
            yield {"ph": "C", "name": counter, "pid": rank, "ts": _us(sample.at_ns), "args": args}


def _named(what: str, rank: int, thread: int = 0, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": args}


def _phase(rank: int, span: Span) -> Event:
    layer = {} if span.layer < 0 else {"layer": span.layer}
    return {
        "ph": "X",
        "name": span.phase.value,
        "cat": "phase" if span.layer < 0 else "layer",
        "pid": rank,
        "tid": _PHASES,
        "ts": _us(span.begin_ns),
        "dur": _us(span.end_ns - span.begin_ns),
        "args": {**layer, **span.detail},
    }


def _wait(rank: int, message: Message) -> Event:
    return {
        "ph": "X",
        "name": f"wait for {message.kind}",
        "cat": "wait",
        "pid": rank,
        "tid": _PHASES,
        "ts": _us(message.waited_from_ns),
        "dur": _us(message.waited_to_ns - message.waited_from_ns),
        "args": _told(message),
    }


def _transfer(rank: int, message: Message, *, identity: str) -> Iterator[Event]:
    for phase, at_ns in (("b", message.posted_ns), ("e", message.waited_to_ns)):
        yield {
            "ph": phase,
            "name": message.kind,
            "cat": "message",
            "id": identity,
            "pid": rank,
            "tid": _WIRE,
            "ts": _us(at_ns),
            "args": _told(message),
        }


def _told(message: Message) -> dict[str, Any]:
    return {
        "layer": message.layer,
        "step": message.step,
        "bytes": message.nbytes,
        "from": message.sources,
    }


def _arrows(ranks: Sequence[RankTrace]) -> Iterator[Event]:
    """From where a message was posted to the end of the wait for it."""
    sent = {
        (rank, *_key(message)): message
        for rank, part in enumerate(ranks)
        for message in part.messages
    }
    identity = 0
    for rank, part in enumerate(ranks):
        for message in part.messages:
            if message.kind not in _POINT_TO_POINT:
                continue
            for source in message.sources:
                posted = sent.get((source, *_key(message)))
                if posted is not None:
                    identity += 1
                    arrow = {"name": message.kind, "cat": "message", "id": identity}
                    yield {**arrow, "ph": "s", **_at(source, posted.posted_ns)}
                    yield {**arrow, "ph": "f", "bp": "e", **_at(rank, message.waited_to_ns)}


def _key(message: Message) -> tuple[str, int, int]:
    return message.kind, message.step, message.layer


def _at(rank: int, time_ns: int) -> Event:
    return {"pid": rank, "tid": _PHASES, "ts": _us(time_ns)}


def _us(time_ns: int) -> float:
    return time_ns / 1e3
