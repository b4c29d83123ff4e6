"""What a rank was doing at each moment of a request: nested phases and waits made one sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from apb.trace.records import Phase, RankTrace, Span


class Activity(StrEnum):
    """What time goes to, as a reader wants it told apart."""

    LOAD = "loading"
    PLAN = "planning"
    PROJECTIONS = "projections"
    COMPRESS = "compression"
    ATTENTION = "attention"
    MLP = "MLP"
    WAIT = "waiting"
    READ = "reading the document"
    QUERY = "reading the question"
    ANSWER = "answering"
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
_FINE = {
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
_IN_PREFILL = (Activity.PROJECTIONS, Activity.COMPRESS, Activity.ATTENTION, Activity.MLP)
_COARSE = {
    **{phase: Activity.READ if fine in _IN_PREFILL else fine for phase, fine in _FINE.items()},
    Phase.PREFILL: Activity.READ,
    **dict.fromkeys((Phase.STEP, Phase.PASS, Phase.CHOOSE, Phase.DRAFT), Activity.ANSWER),
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


def slices_of(part: RankTrace, *, coarse: bool = False) -> list[Slice]:
    """A rank's phases and waits without overlap, in order: an inner one hides the outer one.

    `coarse` tells only what a request consists of.
    """
    kinds = _COARSE if coarse else _FINE
    spans = [
        Slice(span.begin_ns, span.end_ns, kinds[span.phase], -1 if coarse else span.layer)
        for span in part.spans
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
