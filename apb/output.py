"""What a caller gets back, in memory and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from apb.errors import InputError
from apb.files import written_whole


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

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RequestOutput:
        metrics = dict(fields["metrics"])
        metrics["layout"] = [RankLayout(**rank) for rank in metrics["layout"]]
        metrics["audit"] = [LayerFinding(**layer) for layer in metrics["audit"]]
        return cls(**{**fields, "metrics": RequestMetrics(**metrics)})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the file whole or not at all.

    Raises:
        InputError: the folder does not exist or cannot be written to.
    """
    try:
        with written_whole(path) as scratch, scratch.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
    except OSError as error:
        raise InputError(f"output={path} cannot be written: {error.strerror}") from error
