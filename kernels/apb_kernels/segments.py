"""What a launch of the attention kernel is told: tables of tiles and of segments.

Rows are packed: the G query heads of a key/value head stand beside each other, so that packed row
``token * G + g`` is query head ``g`` of the group at that token, and a tile is any run of packed
rows of one group of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class KeySegment(Protocol):
    """Keys that the rows ``[start, stop)`` see: all of them, or row ``start + i`` keys ``0..i``."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def k_KSD(self) -> Tensor: ...
    @property
    def v_KSD(self) -> Tensor: ...
    @property
    def causal(self) -> bool: ...


class Span(NamedTuple):
    """A segment without its tensors."""

    start: int
    stop: int
    num_keys: int
    causal: bool


class Tile(NamedTuple):
    """A program's rows, as the kernel reads them. The order of the fields is the table's."""

    first_token: int
    num_tokens: int
    """Of the group of rows that see the same segments."""
    first_row: int
    """Packed, counted from the group's first token."""
    first_segment: int
    last_segment: int
    """One beyond it."""


TILE_FIELDS = len(Tile._fields)
SEGMENT_FIELDS = 8


def spans_of(segments: Sequence[KeySegment]) -> tuple[Span, ...]:
    """What the tile table needs to know of segments, in their order."""
    return tuple(Span(s.start, s.stop, s.k_KSD.shape[1], s.causal) for s in segments)


def sorted_segments(segments: Sequence[KeySegment]) -> list[KeySegment]:
    """Without the empty ones, those of the same rows beside each other."""
    kept = [s for s in segments if s.stop > s.start and s.k_KSD.shape[1] > 0]
    return sorted(kept, key=lambda segment: (segment.start, segment.stop))


@lru_cache(maxsize=1024)
def tile_table(
    spans: tuple[Span, ...], group_size: int, tile_rows: int, device: torch.device
) -> Tensor:
    """The tiles of all rows in spans ``[N, 5]``, those with the most keys first.

    A launch ends when its last program does; long ones are not to be started last.
    """
    tiles = sorted(_tiles(spans, group_size, tile_rows), key=lambda pair: -pair[0])
    return torch.tensor([tile for _, tile in tiles], dtype=torch.int32).to(device)


def _tiles(spans: tuple[Span, ...], group_size: int, tile_rows: int) -> Iterator[tuple[int, Tile]]:
    """Each tile with the keys that it reads."""
    bounds = [i for i, span in enumerate(spans) if i == 0 or span[:2] != spans[i - 1][:2]]
    for first, last in pairwise([*bounds, len(spans)]):
        start, stop = spans[first][:2]
        for row in range(0, (stop - start) * group_size, tile_rows):
            seen = min(stop - start, (row + tile_rows - 1) // group_size + 1)
            keys = sum(seen if span.causal else span.num_keys for span in spans[first:last])
            yield keys, Tile(start, stop - start, row, first, last)


def unseen_rows(spans: Sequence[Span], num_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows that no span names."""
    gaps, reached = [], 0
    for start, stop, *_ in spans:
        if start > reached:
            gaps.append((reached, start))
        reached = max(reached, stop)
    return [*gaps, (reached, num_rows)] if reached < num_rows else gaps


def _row_stride(x_KSD: Tensor) -> int:
    """A single row's may be anything, which a tensor descriptor would not take."""
    return x_KSD.stride(1) if x_KSD.shape[1] > 1 else x_KSD.shape[2]


def segment_table(segments: Sequence[KeySegment], q_HTD: Tensor) -> Tensor:
    """Places, strides, number of keys and rule of each segment: int64 ``[S, 8]``.

    A place is a distance from the queries in elements, not an address: the compiler knows how an
    argument of the kernel is aligned, but nothing of a pointer made from a number, and would load
    keys one by one.
    """
    rows = [
        [
            *(_distance(segment.k_KSD, q_HTD), _distance(segment.v_KSD, q_HTD)),
            *(segment.k_KSD.stride(0), _row_stride(segment.k_KSD)),
            *(segment.v_KSD.stride(0), _row_stride(segment.v_KSD)),
            *(segment.k_KSD.shape[1], int(segment.causal)),
        ]
        for segment in segments
    ]
    table = torch.tensor(rows, dtype=torch.int64)
    if q_HTD.device.type == "cuda":
        # Pinned, so that the copy does not wait for what the device is still computing.
        return table.pin_memory().to(q_HTD.device, non_blocking=True)
    return table


def _distance(x_KSD: Tensor, q_HTD: Tensor) -> int:
    """Exact, as both start at multiples of 16 bytes."""
    return (x_KSD.data_ptr() - q_HTD.data_ptr()) // q_HTD.element_size()
