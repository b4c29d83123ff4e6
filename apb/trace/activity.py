"""What a rank was doing at each moment of a request: nested phases and waits made one sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from apb.trace.records import AttendedLayer, Phase, RankTrace, RunTrace, Span


class Activity(StrEnum):
    """What time goes to, as a reader wants it told apart."""

    LOAD = "loading"
    PLAN = "planning"
    PROJECTIONS = "projections"
    COMPRESS = "compression"
    ATTENTION = "attention"
    MLP = "MLP"
    WAIT = "waiting"
    QUERY = "reading the question"
    PASS = "verification pass"
    CHOOSE = "choosing"
    DRAFT = "drafting"
    OTHER = "other"


PREFILL = (
    Activity.PROJECTIONS,
    Activity.COMPRESS,
    Activity.ATTENTION,
    Activity.MLP,
    Activity.WAIT,
    Activity.OTHER,
)
DECODE = (
    Activity.PASS,
    Activity.WAIT,
    Activity.CHOOSE,
    Activity.DRAFT,
    Activity.OTHER,
)
_OF_PHASE = {
    Phase.LOAD: Activity.LOAD,
    Phase.PLAN: Activity.PLAN,
    Phase.PREFILL: Activity.OTHER,
    Phase.PROJECTIONS: Activity.PROJECTIONS,
    Phase.COMPRESS: Activity.COMPRESS,
    Phase.ATTENTION: Activity.ATTENTION,
    Phase.OUTPUT: Activity.PROJECTIONS,
    Phase.MLP: Activity.MLP,
    Phase.QUERY: Activity.QUERY,
    Phase.STEP: Activity.OTHER,
    Phase.PASS: Activity.PASS,
    Phase.CHOOSE: Activity.CHOOSE,
    Phase.DRAFT: Activity.DRAFT,
}


class Slice(NamedTuple):
    """A stretch of time that one activity has to itself."""

    begin_ns: int
    end_ns: int
    activity: Activity
    layer: int = -1

    def within(self, begin_ns: int, end_ns: int) -> Slice:
        """The part in a window; of no length where there is none."""
        begin_ns = max(begin_ns, self.begin_ns)
        return self._replace(begin_ns=begin_ns, end_ns=max(begin_ns, min(end_ns, self.end_ns)))

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9


def slices_of(part: RankTrace) -> list[Slice]:
    """A rank's phases and waits without overlap, in order: an inner one hides the outer one."""
    spans = [
        Slice(span.begin_ns, span.end_ns, _OF_PHASE[span.phase], span.layer) for span in part.spans
    ]
    waits = [
        Slice(message.waited_from_ns, message.waited_to_ns, Activity.WAIT, message.layer)
        for message in part.messages
    ]
    return list(_flattened([*spans, *waits]))


def _flattened(nested: Iterable[Slice]) -> Iterator[Slice]:
    open_slices: list[Slice] = []
    cursor = 0

    def until(time_ns: int) -> Iterator[Slice]:
        """What is open until then, the inner ones first."""
        nonlocal cursor
        while open_slices and cursor < time_ns:
            inner = open_slices[-1]
            end_ns = min(inner.end_ns, time_ns)
            if end_ns > cursor:
                yield inner._replace(begin_ns=cursor, end_ns=end_ns)
                cursor = end_ns
            if inner.end_ns <= time_ns:
                open_slices.pop()
        cursor = max(cursor, time_ns)

    for each in sorted(nested, key=lambda each: (each.begin_ns, -each.end_ns)):
        yield from until(each.begin_ns)
        open_slices.append(each)
    yield from until(max((each.end_ns for each in open_slices), default=0))


def window(part: RankTrace, *phases: Phase) -> tuple[int, int]:
    """From the first beginning to the last end of such phases; empty where there are none."""
    spans = [span for span in part.spans if span.phase in phases]
    if not spans:
        return 0, 0
    return min(span.begin_ns for span in spans), max(span.end_ns for span in spans)


def seconds_by_activity(
    slices: Sequence[Slice], begin_ns: int, end_ns: int
) -> dict[Activity, float]:
    """How much of a window went to what."""
    total: dict[Activity, float] = defaultdict(float)
    for each in slices:
        total[each.activity] += each.within(begin_ns, end_ns).seconds
    return total


class Step(NamedTuple):
    """A decoding step as rank 0 saw it."""

    nodes: int
    tokens: int
    seconds: dict[Activity, float]


def decoding_steps(part: RankTrace, slices: Sequence[Slice]) -> list[Step]:
    """In order; `slices` are that rank's."""
    steps = []
    index = 0
    for span in _of(part, Phase.STEP):
        while index < len(slices) and slices[index].end_ns <= span.begin_ns:
            index += 1
        own = index
        while own < len(slices) and slices[own].begin_ns < span.end_ns:
            own += 1
        seconds = seconds_by_activity(slices[index:own], span.begin_ns, span.end_ns)
        steps.append(Step(span.detail["nodes"], span.detail["tokens"], seconds))
    return steps


def _of(part: RankTrace, phase: Phase) -> list[Span]:
    return [span for span in part.spans if span.phase is phase]


class Attended(NamedTuple):
    """Shares of the answer's attention; the columns are blocks, -1 for the document's beginning."""

    blocks: list[int]
    by_token: list[dict[int, float]]
    """Means over the layers looked at."""
    by_layer: dict[int, dict[int, float]]
    """Means over the tokens looked at."""


def attended_blocks(trace: RunTrace) -> Attended | None:
    """What all ranks have seen, put together; None where none has."""
    layers: dict[int, list[AttendedLayer]] = defaultdict(list)
    for part in trace.ranks:
        for found in part.attended:
            layers[found.layer].append(found)
    if not layers:
        return None
    rows = min(len(found.shares) for ranks in layers.values() for found in ranks)
    shares = {
        layer: [
            {
                block: share
                for found in ranks
                for block, share in zip(found.blocks, found.shares[row], strict=True)
            }
            for row in range(rows)
        ]
        for layer, ranks in sorted(layers.items())
    }
    blocks = sorted(
        {block for ranks in layers.values() for found in ranks for block in found.blocks}
    )
    by_token = [_mean([tokens[row] for tokens in shares.values()], blocks) for row in range(rows)]
    by_layer = {layer: _mean(tokens, blocks) for layer, tokens in shares.items()}
    return Attended(blocks, by_token, by_layer)


def _mean(shares: Sequence[dict[int, float]], blocks: Sequence[int]) -> dict[int, float]:
    return {block: sum(row[block] for row in shares) / len(shares) for block in blocks}
