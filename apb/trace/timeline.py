"""Charts with time on the x axis: what each rank does, what it holds, what it has received."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

from apb.trace import svg
from apb.trace.activity import Activity, Slice
from apb.trace.records import RankTrace, Sample

LEFT = 64
"""Where lanes and bars of ranks begin; their names are before it."""
_RIGHT, _TOP = 12, 6
_LANE, _GAP = 22, 6
_BIN = 1.0
"""Pixels that are one colour at least: that of what most of their time went to."""
MAX_LANES = 16


def shown_ranks(world_size: int) -> list[int]:
    """All ranks, or where they are many, some of them evenly spread, the last one included."""
    count = min(world_size, MAX_LANES)
    return [round(index * (world_size - 1) / max(1, count - 1)) for index in range(count)]


def lanes(ranks: Sequence[Sequence[Slice]], begin_ns: int, end_ns: int, *, label: str) -> str:
    """A lane per rank, coloured by activity, over a window of time."""
    axis = _Axis(begin_ns, end_ns)
    parts = []
    shown = shown_ranks(len(ranks))
    for place, rank in enumerate(shown):
        y = _TOP + place * (_LANE + _GAP)
        parts.append(svg.text(LEFT - 8, y + _LANE * 0.68, f"rank {rank}", "label", anchor="end"))
        parts.append(svg.rect(LEFT, y, axis.width, _LANE, "track"))
        parts += _lane(ranks[rank], axis, y)
    bottom = _TOP + len(shown) * (_LANE + _GAP)
    return svg.chart(bottom + 22, [*axis.drawn(_TOP, bottom), *parts], label=label)


class _Axis:
    """Time from left to right."""

    def __init__(self, begin_ns: int, end_ns: int) -> None:
        self.begin_ns, self.end_ns = begin_ns, max(end_ns, begin_ns + 1)
        self.width = svg.WIDTH - LEFT - _RIGHT

    def x(self, time_ns: float) -> float:
        return LEFT + self.width * (time_ns - self.begin_ns) / (self.end_ns - self.begin_ns)

    def time_ns(self, pixel: float) -> float:
        return self.begin_ns + pixel / self.width * (self.end_ns - self.begin_ns)

    def drawn(self, top: float, bottom: float) -> list[str]:
        """Grid and labels."""
        parts = []
        for seconds in svg.ticks(self.begin_ns / 1e9, self.end_ns / 1e9):
            x = self.x(seconds * 1e9)
            parts.append(svg.line(x, top, x, bottom, "grid"))
            parts.append(svg.text(x, bottom + 14, f"{seconds:.6g} s", "tick", anchor="middle"))
        return parts


def _lane(slices: Sequence[Slice], axis: _Axis, y: float) -> list[str]:
    parts = []
    for (activity, layer), bins in groupby(
        enumerate(_painted(slices, axis)), key=lambda item: item[1]
    ):
        places = [place for place, _ in bins]
        if activity is None:
            continue
        x, width = LEFT + places[0] * _BIN, len(places) * _BIN
        seconds = width / axis.width * (axis.end_ns - axis.begin_ns) / 1e9
        where = f", layer {layer}" if layer >= 0 else ""
        hint = f"{activity}{where}: about {svg.amount(seconds, 's')}"
        parts.append(svg.rect(x, y, width, _LANE, colour(activity), hint))
    return parts


_Paint = tuple[Activity | None, int]
"""An activity and its layer."""
_BARE: _Paint = (None, -1)


def _painted(slices: Sequence[Slice], axis: _Axis) -> list[_Paint]:
    """What most of each bin's time went to."""
    count = int(axis.width / _BIN)
    edges = [axis.time_ns(index * _BIN) for index in range(count + 1)]
    painted: list[_Paint] = []
    first = 0
    for begin_ns, end_ns in pairwise(edges):
        while first < len(slices) and slices[first].end_ns <= begin_ns:
            first += 1
        most, best = 0.0, _BARE
        index = first
        while index < len(slices) and slices[index].begin_ns < end_ns:
            each = slices[index]
            covered = min(each.end_ns, end_ns) - max(each.begin_ns, begin_ns)
            if covered > most:
                most, best = covered, (each.activity, each.layer)
            index += 1
        painted.append(best if most > (end_ns - begin_ns) / 4 else _BARE)
    return painted


def colour(activity: Activity) -> str:
    """The class that the style sheet gives a colour."""
    return f"a-{activity.name.lower()}"


def curves(
    parts: Sequence[RankTrace], value: Callable[[Sample], int], *, label: str, height: int = 130
) -> str:
    """One line per rank over the whole request; those that end highest and lowest are named."""
    samples = {rank: parts[rank].samples for rank in shown_ranks(len(parts))}
    samples = {rank: found for rank, found in samples.items() if found}
    if not samples:
        return ""
    end_ns = max(found[-1].at_ns for found in samples.values())
    axis = _Axis(0, end_ns)
    axis.width -= 60  # for the names
    top = max(value(sample) for found in samples.values() for sample in found) or 1
    bottom = _TOP + height

    def y(amount: float) -> float:
        return bottom - height * amount / top

    drawn = axis.drawn(_TOP, bottom)
    for tick in _byte_ticks(top):
        drawn.append(svg.line(LEFT, y(tick), LEFT + axis.width, y(tick), "grid"))
        drawn.append(svg.text(LEFT - 8, y(tick) + 4, svg.amount(tick, "B"), "tick", anchor="end"))
    for rank, found in samples.items():
        points = [(axis.x(sample.at_ns), y(value(sample))) for sample in found]
        drawn.append(svg.path(points, "curve", f"rank {rank}"))
    last = {rank: value(found[-1]) for rank, found in samples.items()}
    named = {max(last, key=lambda rank: last[rank]), min(last, key=lambda rank: last[rank])}
    for rank in named:
        x = axis.x(samples[rank][-1].at_ns)
        drawn.append(svg.text(x + 6, y(last[rank]) + 4, f"rank {rank}", "tick"))
    return svg.chart(bottom + 22, drawn, label=label)


def _byte_ticks(top: float) -> list[float]:
    size = next(size for size in (2**30, 2**20, 2**10, 1) if top >= size)
    return [size * tick for tick in svg.ticks(0, top / size, 3)]
