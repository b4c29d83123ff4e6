"""Charts of amounts: time per rank and activity, decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from apb.trace import svg
from apb.trace.activity import DECODE, Activity, Step
from apb.trace.timeline import LEFT, colour, shown_ranks

_RIGHT, _TOP = 64, 6
_BAR, _GAP = 20, 6
_MAX_STEPS = 120


def stacked(
    seconds: Sequence[dict[Activity, float]], activities: Sequence[Activity], *, label: str
) -> str:
    """A bar per rank: what the seconds went to, the whole of them at its end."""
    shown = shown_ranks(len(seconds))
    totals = [sum(seconds[rank].get(activity, 0.0) for activity in activities) for rank in shown]
    longest = max(totals) or 1.0
    scale = (svg.WIDTH - LEFT - _RIGHT) / longest
    parts = []
    for place, (rank, total) in enumerate(zip(shown, totals, strict=True)):
        y, x = _TOP + place * (_BAR + _GAP), float(LEFT)
        parts.append(svg.text(LEFT - 8, y + _BAR * 0.7, f"rank {rank}", "label", anchor="end"))
        for activity in activities:
            value = seconds[rank].get(activity, 0.0)
            hint = f"rank {rank}, {activity}: {svg.amount(value, 's')} ({value / longest:.0%})"
            parts.append(svg.rect(x, y, scale * value, _BAR, colour(activity), hint))
            if scale * value > 44:
                parts.append(svg.text(x + 5, y + _BAR * 0.7, svg.amount(value, "s"), "on-bar"))
            x += scale * value
        parts.append(svg.text(x + 6, y + _BAR * 0.7, svg.amount(total, "s"), "tick"))
    return svg.chart(_TOP + len(shown) * (_BAR + _GAP), parts, label=label)


def decoding(steps: Sequence[Step], *, label: str) -> str:
    """Above, what each step's time went to; below, tokens read and tokens emitted."""
    groups = _grouped(steps)
    height, under, gap = 130, 70, 26
    width = min(40.0, (svg.WIDTH - LEFT - 12) / len(groups))
    longest = max(sum(group.seconds.values()) for group in groups) or 1.0
    most = max(group.nodes for group in groups)
    base, floor = _TOP + height, _TOP + height + gap + under
    parts = [svg.line(LEFT, base, svg.WIDTH - 12, base, "axis")]
    for tick in svg.ticks(0, longest, 4):
        y = base - height * tick / longest
        parts.append(svg.line(LEFT, y, svg.WIDTH - 12, y, "grid"))
        parts.append(svg.text(LEFT - 8, y + 4, svg.amount(tick, "s"), "tick", anchor="end"))
    for tick in svg.ticks(0, most, 2):
        y = floor - under * tick / most
        parts.append(svg.line(LEFT, y, svg.WIDTH - 12, y, "grid"))
        parts.append(svg.text(LEFT - 8, y + 4, f"{tick:g}", "tick", anchor="end"))
    for place, group in enumerate(groups):
        x, y = LEFT + place * width, float(base)
        for activity in DECODE:
            value = group.seconds.get(activity, 0.0)
            tall = height * value / longest
            y -= tall
            hint = f"{group.name}, {activity}: {svg.amount(value, 's')}"
            parts.append(svg.rect(x + 0.5, y, max(0.5, width - 1), tall, colour(activity), hint))
        hint = f"{group.name}: {group.nodes:.3g} tokens read, {group.tokens:.3g} emitted"
        for value, class_ in ((group.nodes, "read"), (group.tokens, "emitted")):
            tall = under * value / most
            parts.append(svg.rect(x + 0.5, floor - tall, max(0.5, width - 1), tall, class_, hint))
    parts.append(svg.text(LEFT, base + 16, "time of each step", "tick"))
    parts.append(svg.line(LEFT, floor, svg.WIDTH - 12, floor, "axis"))
    parts.append(svg.text(LEFT, floor + 16, "tokens read in each step, and emitted", "tick"))
    return svg.chart(floor + 22, parts, label=label)


class _Group(NamedTuple):
    """Some steps in a row, their figures averaged, so that long answers fit."""

    name: str
    nodes: float
    tokens: float
    seconds: dict[Activity, float]


def _grouped(steps: Sequence[Step]) -> list[_Group]:
    size = -(-len(steps) // _MAX_STEPS)
    groups = []
    for start in range(0, len(steps), size):
        group = steps[start : start + size]
        name = f"step {start + 1}" if size == 1 else f"steps {start + 1} to {start + len(group)}"
        seconds = {
            activity: fmean(step.seconds.get(activity, 0.0) for step in group)
            for activity in DECODE
        }
        nodes, tokens = (fmean(getattr(step, key) for step in group) for key in ("nodes", "tokens"))
        groups.append(_Group(name, nodes, tokens, seconds))
    return groups
