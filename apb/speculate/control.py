"""How large the next tree may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class ControllerKind(Enum):
    """`fixed`: always the largest tree. `measured`: the size that yields most tokens a second."""

    fixed = "fixed"
    measured = "measured"


class StepReport(NamedTuple):
    """What the controller learns from a step."""

    allowed: int
    """Nodes that the tree was allowed to have."""
    num_nodes: int
    path: Sequence[int]
    """Accepted nodes, the root first."""
    seconds: float
    """Of drafting, verifying and all exchanges."""


class LengthController(ABC):
    """Chooses the number of nodes of the next tree, the root included."""

    @abstractmethod
    def max_nodes(self) -> int: ...

    @abstractmethod
    def update(self, report: StepReport) -> None: ...


class FixedController(LengthController):
    """Always the same."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes

    def max_nodes(self) -> int:
        return self._max_nodes

    def update(self, report: StepReport) -> None:
        """Nothing to learn."""


class MeasuredController(LengthController):
    """Weighs what each size would have yielded against what a step of that size takes.

    A drafter adds the same nodes first whatever its budget, so the first k nodes are the tree that
    a budget of k would have given, and every step tells what all smaller ones would have accepted.
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
            self._time.add(report.num_nodes, report.seconds)
        if report.num_nodes == 1 < report.allowed:
            return  # nothing to draft, which says nothing of sizes
        cut_short = report.num_nodes == report.allowed
        for size in self._sizes:
            if size <= report.allowed or not cut_short:
                self._yields[size].add(sum(node < size for node in report.path))
        if cut_short and report.num_nodes > 1 and report.path[-1] == report.num_nodes - 1:
            self._next = self._larger(report.num_nodes)


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
    controllers = {
        ControllerKind.fixed: FixedController,
        ControllerKind.measured: MeasuredController,
    }
    return controllers[kind](max_nodes)
