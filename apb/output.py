"""What a caller gets back, in memory and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import InputError
from apb.files import written_whole
from apb.trace.chrome import chrome_trace
from apb.trace.page import render_page
from apb.trace.records import RunTrace


class Likelihood(NamedTuple):
    """One value per token of a continuation."""

    logprobs: list[float]
    is_best: list[bool]
    """Whether no other token is likelier there."""


class Divergence(NamedTuple):
    """One value per token of a continuation, in nats."""

    logprobs: list[float]
    """Of the token, after the document as the method has read it."""
    exact: list[float]
    """Of the token, with exact attention."""
    kl: list[float]
    """KL(exact || method) of the whole distributions there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """One rank's part of a prefill: blocks as ``[start, stop]``, tokens run, tokens cached."""

    blocks: list[list[int]]
    tokens_run: int
    tokens_cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFinding:
    """An audited layer, averaged over the sampled rows."""

    layer: int
    recovered_mass: float
    """Exact attention probability on the keys that the rows saw, from 0 to 1."""
    output_error: float
    """Distance of the attention output from the exact one, relative to the latter's norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """What one request cost. Lists have one entry per rank; times are rank 0's, in seconds."""

    context_tokens: int
    query_tokens: int
    generated_tokens: int
    model: str
    method: str
    num_blocks: int
    backend: str
    """What computed attention; `auto` names its choice."""
    drafter: str
    placement: str
    """Where the document's KV was while decoding: `sharded` or `rank0`."""
    layout: list[RankLayout]
    prefill_s: float
    ttft_s: float
    decode_s: float
    tokens_per_s: float
    """Generated tokens after the first, per second of decoding; 0 where there is no such token."""
    bytes_exchanged: list[int]
    """Bytes received from other ranks."""
    peak_memory_bytes: list[int]
    acceptance_length: float
    """Tokens emitted per forward pass of the target model while decoding."""
    tree_nodes: float
    """Tokens read per such pass, the drafted ones and the last of the answer; a mean."""
    draft_s: float
    """Drafting and learning from what was verified."""
    versions: dict[str, str]
    device: str
    dtype: str
    audit: list[LayerFinding] = field(default_factory=list)
    """Of each audited layer of an approximate prefill: recovered mass and output error."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what differs from the request, such as fewer blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """An answer. `token_ids` ends with the stop token where one ended it; `text` leaves it out."""

    text: str
    token_ids: list[int]
    finish_reason: str
    """`stop`, `length` or `cancelled`."""
    metrics: RequestMetrics
    trace: RunTrace | None = None
    """What every rank did and when, with ``trace=true``."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RequestOutput:
        metrics = dict(fields["metrics"])
        metrics["layout"] = [RankLayout(**rank) for rank in metrics["layout"]]
        metrics["audit"] = [LayerFinding(**layer) for layer in metrics["audit"]]
        trace = fields.get("trace")
        return cls(
            text=fields["text"],
            token_ids=fields["token_ids"],
            finish_reason=fields["finish_reason"],
            metrics=RequestMetrics(**metrics),
            trace=None if trace is None else RunTrace.from_json(trace),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it; `trace` is left out where there is none."""
        trace = {} if self.trace is None else {"trace": self.trace.to_json()}
        return {**self._result(), **trace}

    def _result(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "metrics": asdict(self.metrics),
        }

    def write(self, path: str | Path) -> list[Path]:
        """Write the answer and its metrics as JSON, and a trace in two files beside it.

        Of ``result.json`` these are ``result.trace.json`` in Chrome's Trace Event format, which
        https://ui.perfetto.dev opens, and ``result.html``, a report that needs no network. Each
        file is written whole or not at all.

        Returns:
            The files written.

        Raises:
            InputError: the folder does not exist or cannot be written to.
        """
        result = self._result()
        path = Path(path)
        write_json(path, result)
        if self.trace is None:
            return [path]
        events, page = trace_paths(path)
        _write_whole(events, json.dumps(chrome_trace(self.trace, result), separators=(",", ":")))
        _write_whole(page, render_page(self.trace, result))
        return [path, events, page]


def trace_paths(path: Path) -> tuple[Path, Path]:
    """Where the trace and the report of a result go.

    Raises:
        InputError: the result itself is there.
    """
    events, page = path.with_suffix(".trace.json"), path.with_suffix(".html")
    if path == page:
        raise InputError(
            f"output={path} is where trace=true puts its report: call the result NAME.json"
        )
    return events, page


def check_output(output: str | Path) -> None:
    """Raises InputError unless that is a file, or may become one."""
    path = Path(os.path.realpath(output))  # `resolve` raises where links form a circle
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output={output} is no file in an existing folder")
    if path.exists() and not path.is_file():
        raise InputError(f"output={output} is a device or a pipe: name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"output={output} is in a folder that may not be written to")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the file whole or not at all.

    Raises:
        InputError: the folder does not exist or cannot be written to.
    """
    _write_whole(path, json.dumps(value, indent=2, ensure_ascii=False))


def _write_whole(path: Path, text: str) -> None:
    try:
        with written_whole(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"output={path} cannot be written: {error.strerror}") from error
