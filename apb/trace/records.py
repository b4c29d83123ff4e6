"""What a trace holds.

Its JSON is lists in the order of the fields, which keeps what travels between ranks small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

SINK_TOKENS = 4
"""The first tokens of a text draw attention whatever they say (Xiao et al., ICLR 2024): they are
counted apart, lest the first block look important."""


class Phase(StrEnum):
    """What a rank is busy with."""

    LOAD = "load"
    PLAN = "plan"
    PREFILL = "prefill"
    QUERY = "query"
    STEP = "decode"
    PROJECTIONS = "projections"
    """Norm, query, key and value projections and RoPE of a layer."""
    ATTENTION = "attention"
    """Of a layer, with compression and the waiting for messages inside it."""
    COMPRESS = "compress"
    OUTPUT = "output"
    """The output projection."""
    MLP = "mlp"
    PASS = "pass"
    """A forward pass over drafts."""
    CHOOSE = "choose"
    """Logits, verification and the next draft."""
    DRAFT = "draft"


class Span(NamedTuple):
    """A phase of one rank."""

    phase: Phase
    layer: int
    """-1 where the phase belongs to no layer."""
    begin_ns: int
    end_ns: int
    detail: dict[str, int]
    """Of a decoding step: `nodes` read and `tokens` emitted."""

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9


class Message(NamedTuple):
    """A message that one rank took part in."""

    kind: str
    step: int
    layer: int
    posted_ns: int
    waited_from_ns: int
    waited_to_ns: int
    """By then it had arrived."""
    nbytes: int
    """Received from other ranks, headers included."""
    sources: list[int]
    """Of what was received, without this rank."""

    @property
    def waited_s(self) -> float:
        return (self.waited_to_ns - self.waited_from_ns) / 1e9


class Sample(NamedTuple):
    """What a rank held and had received at one moment."""

    at_ns: int
    memory_bytes: int
    """CUDA allocator on a GPU, resident set on the CPU."""
    received_bytes: int


class AttendedLayer(NamedTuple):
    """How much of their attention the answer's rows gave to a rank's blocks in one layer.

    A row is a token as it was read; it predicts the next one. There is one per token of the answer,
    from its first on, and each has a probability per block. What means leave to 1 over all ranks
    went to the question and to the answer itself.
    """

    layer: int
    blocks: list[int]
    """Their indices in the document; -1 stands for its first `SINK_TOKENS` tokens."""
    means: list[list[float]]
    """Over heads."""
    peaks: list[list[float]]
    """Of the head that gave the block most: those that look things up put nearly all they have on
    the place that says it (Wu et al., ICLR 2025), which a mean over heads does not show."""


class RankTrace(NamedTuple):
    """One rank's part, in nanoseconds of the machine's monotonic clock until ranks are aligned."""

    host: str
    pid: int
    device: str
    clock_error_ns: int
    """By how much its times may be off from rank 0's."""
    begin_ns: int
    """When it took the request."""
    spans: list[Span]
    messages: list[Message]
    samples: list[Sample]
    attended: list[AttendedLayer]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> RankTrace:
        host, pid, device, error_ns, begin_ns, spans, messages, samples, attended = fields
        return cls(
            host,
            pid,
            device,
            error_ns,
            begin_ns,
            [Span(Phase(phase), *rest) for phase, *rest in spans],
            [Message(*message) for message in messages],
            [Sample(*sample) for sample in samples],
            [AttendedLayer(*layer) for layer in attended],
        )

    def retimed(self, time: Callable[[int], int]) -> RankTrace:
        """With `time` of each of its times."""
        spans = [
            span._replace(begin_ns=time(span.begin_ns), end_ns=time(span.end_ns))
            for span in self.spans
        ]
        messages = [
            message._replace(
                posted_ns=time(message.posted_ns),
                waited_from_ns=time(message.waited_from_ns),
                waited_to_ns=time(message.waited_to_ns),
            )
            for message in self.messages
        ]
        samples = [sample._replace(at_ns=time(sample.at_ns)) for sample in self.samples]
        return self._replace(
            begin_ns=time(self.begin_ns), spans=spans, messages=messages, samples=samples
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTrace:
    """What all ranks did for one request, in nanoseconds since the first of them took it."""

    ranks: list[RankTrace]
    tokens: list[str]
    """The answer's, each as text of its own."""

    @classmethod
    def of(cls, ranks: Sequence[RankTrace], tokens: list[str]) -> RunTrace:
        """From ranks whose times are of one clock."""
        zero_ns = min(part.begin_ns for part in ranks)
        moved = [part.retimed(lambda time_ns: time_ns - zero_ns) for part in ranks]
        return cls(ranks=moved, tokens=tokens)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RunTrace:
        return cls(
            ranks=[RankTrace.from_json(rank) for rank in fields["ranks"]], tokens=fields["tokens"]
        )

    def to_json(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "tokens": self.tokens}
