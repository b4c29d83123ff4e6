"""Cutting a sequence so that the slowest rank is as fast as possible. Integers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class BlockLoad(NamedTuple):
    """A block whose length is sought: keys it sees before its own, and its shortest length."""

    upstream: int
    min_len: int


class RankLoad(NamedTuple):
    """A rank's blocks, and what it costs whatever their lengths."""

    linear: int
    blocks: tuple[BlockLoad, ...]
    attention: int = 0
    wire: int = 0
    """Runs while attention does, so that only the longer of the two counts."""

    @property
    def min_tokens(self) -> int:
        return sum(block.min_len for block in self.blocks)


class UnitCosts(NamedTuple):
    """Of a row (linear maps) and of a query-key pair, in any common unit; both positive."""

    row: int
    pair: int


def causal_pairs(length: int, upstream: int = 0) -> int:
    """Query-key pairs of `length` rows that see `upstream` keys and causally each other."""
    return length * (length + 1) // 2 + length * upstream


def rank_cost(load: RankLoad, lengths: Sequence[int], unit: UnitCosts) -> int:
    blocks = zip(lengths, load.blocks, strict=True)
    pairs = sum(causal_pairs(length, block.upstream) for length, block in blocks)
    attention = load.attention + unit.pair * pairs
    return load.linear + unit.row * sum(lengths) + max(attention, load.wire)


def cheapest_lengths(load: RankLoad, num_tokens: int) -> list[int]:
    """How a rank's blocks share that many tokens at the least cost; earlier blocks get the rest.

    The next row of a block costs its length plus its upstream keys, so that these sums are levelled
    like water in basins of different depth.
    """
    blocks = sorted(load.blocks, key=lambda block: block.upstream + block.min_len)
    spare = num_tokens - load.min_tokens
    assert spare >= 0, "fewer tokens than the shortest blocks hold"
    if not blocks:
        assert spare == 0, "tokens for a rank without a block"
        return []
    if len(blocks) == 1:
        return [num_tokens]
    rising, held = 0, 0  # blocks that the level has reached, and what they hold beyond min_len
    level = blocks[0].upstream + blocks[0].min_len
    for block in blocks:
        floor = block.upstream + block.min_len
        if held + rising * (floor - level) > spare:
            break
        held += rising * (floor - level)
        rising, level = rising + 1, floor
    level += (spare - held) // rising
    lengths = [max(block.min_len, level - block.upstream) for block in load.blocks]
    rest = num_tokens - sum(lengths)
    for index, block in enumerate(load.blocks):
        if rest and lengths[index] + block.upstream == level:
            lengths[index] += 1
            rest -= 1
    return lengths


def balance(num_tokens: int, loads: Sequence[RankLoad], unit: UnitCosts) -> list[list[int]]:
    """Block lengths per rank that minimise the largest rank cost; they sum to `num_tokens`.

    A rank's cost depends on its own lengths alone, so the optimum is the smallest bound under which
    all ranks together can take the tokens; ranks whose shortest blocks exceed it keep those. All
    other ranks are level to one token, and earlier ranks get the rest.

    Raises:
        ValueError: the shortest lengths exceed the tokens, or no rank has a block.
    """
    shortest = sum(load.min_tokens for load in loads)
    if shortest > num_tokens or not any(load.blocks for load in loads):
        raise ValueError(f"{num_tokens} tokens do not fit blocks of {shortest} tokens or more")

    def cost(load: RankLoad, count: int) -> int:
        return rank_cost(load, cheapest_lengths(load, count), unit)

    def most(load: RankLoad, bound: int) -> int:
        """The most tokens that the rank takes within the bound, or the fewest that it can."""
        if not load.blocks or cost(load, load.min_tokens) > bound:
            return load.min_tokens
        near = _tokens_within(load, bound, unit)
        return _last(load.min_tokens, num_tokens, lambda count: cost(load, count) <= bound, near)

    highest = max(cost(load, num_tokens) for load in loads if load.blocks)
    bound = highest - _last(
        0, highest, lambda below: sum(most(load, highest - below) for load in loads) >= num_tokens
    )
    counts = [most(load, bound) for load in loads]
    surplus = sum(counts) - num_tokens
    for rank in reversed(range(len(loads))):
        # No rank takes two tokens more than below the bound, as a token costs at least one unit.
        given_back = min(surplus, counts[rank] - most(loads[rank], bound - 1))
        counts[rank] -= given_back
        surplus -= given_back
    return [cheapest_lengths(load, count) for load, count in zip(loads, counts, strict=True)]


def _tokens_within(load: RankLoad, bound: int, unit: UnitCosts) -> int:
    """About how many tokens a rank takes within the bound: exactly so many with a single block."""
    blocks = len(load.blocks)
    upstream = sum(block.upstream for block in load.blocks) / blocks
    # Equal shares x of all blocks: pair / 2 * x^2 + (row + pair * (upstream + 1 / 2)) * x = spare.
    linear = unit.row + unit.pair * (upstream + 0.5)
    spare = max(0, bound - load.linear - load.attention) / blocks
    each = (math.sqrt(linear * linear + 2 * unit.pair * spare) - linear) / unit.pair
    return int(blocks * each)


def _last(low: int, high: int, holds: Callable[[int], bool], near: int | None = None) -> int:
    """The largest value from `low` to `high` for which a predicate holds that holds at `low`.

    It is looked for around `near` first, in steps that double.
    """
    if near is not None:
        value, step = min(max(near, low), high), 1
        if holds(value):
            while value < high and holds(min(high, value + step)):
                value, step = min(high, value + step), 2 * step
            low, high = value, min(high, value + step)
        else:
            while not holds(max(low, value - step)):
                value, step = value - step, 2 * step
            low, high = max(low, value - step), value - 1
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
