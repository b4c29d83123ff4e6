"""How large the next tree may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

from apb.speculate.chances import Chances, best_part, by_chance
from apb.speculate.tree import DraftTree


class ControllerKind(Enum):
    """`fixed`: always the largest tree. `confidence`: nodes that are likely enough. `measured`: the
    size whose trees have yielded most tokens a second. `expected`: for each tree the part that
    promises most tokens a second.
    """

    fixed = "fixed"
    confidence = "confidence"
    measured = "measured"
    expected = "expected"


class StepReport(NamedTuple):
    """What the controller learns from a step."""

    allowed: int
    """Nodes that the tree was allowed to have."""
    num_nodes: int
    path: Sequence[int]
    """Accepted nodes, the root first."""
    seconds: float
    """Of verifying and all exchanges."""
    draft_s: float
    pool: DraftTree
    """Everything that was drafted, of which the tree is a part."""
    emitted: Sequence[int]


class LengthController(ABC):
    """Chooses the number of nodes of the next tree, the root included."""

    @abstractmethod
    def max_nodes(self) -> int:
        """How many the next tree may have."""

    def choose(self, pool: DraftTree, allowed: int) -> DraftTree:
        """The part of what was drafted that is sent to the target; by default what is claimed to be
        likeliest.
        """
        return best_part(pool, Chances().of(pool), allowed)

    @abstractmethod
    def update(self, report: StepReport) -> None:
        """Learn from the step that followed."""


class FixedController(LengthController):
    """Always the same."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes

    def max_nodes(self) -> int:
        return self._max_nodes

    def update(self, report: StepReport) -> None:
        """Nothing to learn."""


class ConfidenceController(LengthController):
    """Leaves out nodes whose chance is below a threshold.

    Stopping where a rejection is likely is the best policy of SpecDec++ (Huang et al. 2024,
    https://arxiv.org/abs/2405.19715), and Kangaroo's rule (https://arxiv.org/abs/2404.18911).
    """

    def __init__(self, max_nodes: int, *, least: float = 0.1) -> None:
        self._max_nodes, self._least = max_nodes, least
        self._chances = Chances()

    def max_nodes(self) -> int:
        return self._max_nodes

    def choose(self, pool: DraftTree, allowed: int) -> DraftTree:
        chances = self._chances.of(pool)
        likely = sum(chance >= self._least for chance in chances)
        return best_part(pool, chances, min(likely, allowed))

    def update(self, report: StepReport) -> None:
        self._chances.learn(report.pool, report.emitted)


class ExpectedController(LengthController):
    """Takes nodes in order of their chances, as many as promise most tokens a second.

    A step emits one token and each accepted node's, so a tree's expected yield is the sum of its
    nodes' chances, the root's being 1. What a step of so many nodes takes is measured, exchanges
    included, so trees are small where nodes cost most and where drafts are poor, and large within
    a quote. One step in sixteen takes another size, so that times are known beside the best one.
    """

    _EXPLORE_EVERY = 16

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._chances, self._time = Chances(), StepTime(max_nodes)
        self._count = 0

    def max_nodes(self) -> int:
        return self._max_nodes

    def choose(self, pool: DraftTree, allowed: int) -> DraftTree:
        chances = self._chances.of(pool)
        yields, best, best_rate = 0.0, 1, 0.0
        for size, chance in enumerate(sorted(chances, reverse=True)[:allowed], start=1):
            yields += chance
            rate = yields / self._time.of(size)
            if rate > best_rate:
                best, best_rate = size, rate
        return best_part(pool, chances, self._or_another(best, min(allowed, len(pool))))

    def _or_another(self, best: int, largest: int) -> int:
        self._count += 1
        turn, rest = divmod(self._count, self._EXPLORE_EVERY)
        others = (1, min(2 * best, largest), (best + 1) // 2)
        return best if rest else others[turn % len(others)]

    def update(self, report: StepReport) -> None:
        self._chances.learn(report.pool, report.emitted)
        self._time.add(report.num_nodes, report.seconds)


class StepTime:
    """Seconds of a step over so many nodes: a line through what was measured, and around each size
    what it has differed from that line.
    """

    _KEEP = 0.96
    _FEW = 3.0
    """Observations at which a size's own figures count as much as the line."""
    _SLOPE = 0.02
    """Of a node, relative to a step of one, before anything was measured."""

    def __init__(self, max_nodes: int) -> None:
        self._line = _Line(self._KEEP)
        self._apart = [(0.0, 0.0)] * (max_nodes + 1)
        self._count = 0

    def of(self, size: int) -> float:
        if not self._count:
            return 1.0 + self._SLOPE * (size - 1)
        total, weight = self._apart[size]
        return self._line.at(size) * (1.0 + total / (weight + self._FEW))

    def add(self, size: int, seconds: float) -> None:
        self._count += 1
        if self._count == 1:
            return  # the first step warms up
        if self._count == 2:  # so that the line has a slope from the start
            most = len(self._apart) - 1
            base = seconds / (1.0 + self._SLOPE * (size - 1))
            for other in (1, most):
                self._line.add(other, base * (1.0 + self._SLOPE * (other - 1)))
        # A hiccup of the machine says nothing of a size.
        seconds = min(seconds, 3.0 * self.of(size))
        self._line.add(size, seconds)
        for near in range(max(1, size - 1), min(size + 2, len(self._apart))):
            total, weight = self._apart[near]
            apart = seconds / self._line.at(size) - 1.0
            self._apart[near] = self._KEEP * total + apart, self._KEEP * weight + 1.0


class MeasuredController(LengthController):
    """Weighs what each size would have yielded against what a step of that size takes.

    The k nodes that are claimed to be likeliest, of drawn ones the first k, are the tree that a
    budget of k would have given, so every step tells what all smaller ones would have accepted.
    Step time is fitted as a line over the number of nodes; it contains what a larger tree costs on
    the wire. Older steps count less. One step in eight takes a size beside the best one, larger and
    smaller in turn, and after a tree that was accepted to its last node the next one is larger, so
    that a change of the text is noticed.
    """

    _KEEP = 0.95
    _EXPLORE_EVERY = 8
    _SMALLEST_TRIED = 4

    def __init__(self, max_nodes: int) -> None:
        sizes = {1, max_nodes}
        while max_nodes > 1:
            sizes.add(max_nodes)
            max_nodes //= 2
        self._sizes = sorted(sizes)
        self._yields = {size: _Mean(self._KEEP) for size in self._sizes}
        self._time = _Line(self._KEEP)
        self._count = 0
        self._next: int | None = self._sizes[-1]

    def max_nodes(self) -> int:
        self._count += 1
        if self._next is not None:
            size, self._next = self._next, None
            return size
        # Among equals the largest: where nothing is drafted, larger trees cost nothing.
        best = max(self._sizes, key=lambda size: (self._rate(size), size))
        turn, rest = divmod(self._count, self._EXPLORE_EVERY)
        if rest:
            return best
        return self._larger(max(best, self._SMALLEST_TRIED - 1)) if turn % 2 else best // 2 or 1

    def _larger(self, size: int) -> int:
        return next((other for other in self._sizes if other > size), self._sizes[-1])

    def _rate(self, size: int) -> float:
        return self._yields[size].value / self._time.at(size)

    def update(self, report: StepReport) -> None:
        if self._count > 1:  # the first step of a request warms up
            self._time.add(report.num_nodes, report.seconds + report.draft_s)
        if report.num_nodes == 1 < report.allowed:
            return  # nothing to draft, which says nothing of sizes
        cut_short = report.num_nodes == report.allowed
        ranks = self._ranks(report)
        for size in self._sizes:
            if size <= report.allowed or not cut_short:
                self._yields[size].add(sum(rank < size for rank in ranks))
        if cut_short and report.num_nodes > 1 and max(ranks) == report.num_nodes - 1:
            self._next = self._larger(report.num_nodes)

    def _ranks(self, report: StepReport) -> Sequence[int]:
        """Of the accepted nodes, among all that were sent: the smallest budget with the node."""
        if report.pool.proposals:
            return report.path
        order = by_chance(Chances().of(report.pool))[: report.num_nodes]
        sent = sorted(order)
        return [order.index(sent[node]) for node in report.path]


class _Mean:
    """Of values that count less the older they are; 1 before the first, as a step emits a token."""

    def __init__(self, keep: float) -> None:
        self._keep, self._sum, self._weight = keep, 0.0, 0.0

    def add(self, value: float) -> None:
        self._sum = self._keep * self._sum + value
        self._weight = self._keep * self._weight + 1

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 1.0


class _Line:
    """Least squares over points that count less the older they are; it does not fall."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        keep = self._keep
        self._n, self._x, self._y = keep * self._n + 1, keep * self._x + x, keep * self._y + y
        self._xx, self._xy = keep * self._xx + x * x, keep * self._xy + x * y

    def at(self, x: float) -> float:
        """The height there; 1 before the first point, and never below half the mean height."""
        if not self._n:
            return 1.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        slope = (self._xy / self._n - mean_x * mean_y) / spread if spread > 1e-9 else 0.0
        return max(mean_y / 2, mean_y + max(0.0, slope) * (x - mean_x))


def build_controller(kind: ControllerKind, max_nodes: int) -> LengthController:
    controllers: dict[ControllerKind, Callable[[int], LengthController]] = {
        ControllerKind.fixed: FixedController,
        ControllerKind.confidence: ConfidenceController,
        ControllerKind.measured: MeasuredController,
        ControllerKind.expected: ExpectedController,
    }
    return controllers[kind](max_nodes)
