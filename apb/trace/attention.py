"""What the answer attended to, put together from all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from apb.trace.records import AttendedLayer, RunTrace


class Attended(NamedTuple):
    """Attention probabilities by block; see `AttendedLayer`."""

    blocks: list[int]
    layers: list[int]
    means: list[list[float]]
    """By token of the answer and block: over all heads of these layers."""
    peaks: list[list[float]]
    """By token and block: of the head that gave the block most."""
    layer_peaks: list[list[float]]
    """By layer and block: the same over all tokens."""


def attended_blocks(trace: RunTrace) -> Attended | None:
    """None where no rank has looked."""
    found: dict[int, list[AttendedLayer]] = defaultdict(list)
    for part in trace.ranks:
        for layer in part.attended:
            found[layer.layer].append(layer)
    if not found:
        return None
    layers = sorted(found)
    means = [_joined(found[layer], lambda each: each.means) for layer in layers]
    peaks = [_joined(found[layer], lambda each: each.peaks) for layer in layers]
    blocks = sorted(block for each in found[layers[0]] for block in each.blocks)
    return Attended(
        blocks,
        layers,
        [_over(fmean, tokens) for tokens in zip(*means, strict=True)],
        [_over(max, tokens) for tokens in zip(*peaks, strict=True)],
        [_over(max, tokens) for tokens in peaks],
    )


def _joined(
    ranks: Sequence[AttendedLayer], shares: Callable[[AttendedLayer], list[list[float]]]
) -> list[list[float]]:
    """One layer's shares by token and block, the blocks of all ranks in order."""
    blocks = [block for each in ranks for block in each.blocks]
    order = sorted(range(len(blocks)), key=blocks.__getitem__)
    rows = [
        [share for row in token for share in row] for token in zip(*map(shares, ranks), strict=True)
    ]
    return [[row[place] for place in order] for row in rows]


def _over(
    summary: Callable[[Sequence[float]], float], rows: Sequence[Sequence[float]]
) -> list[float]:
    """Each block's shares of several rows, summed up."""
    return [summary(column) for column in zip(*rows, strict=True)]
