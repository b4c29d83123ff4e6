"""Guarantees of balancing: no other cut of the tokens makes the slowest rank faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from apb.balance import BlockLoad, RankLoad, UnitCosts, balance, cheapest_lengths

BLOCKS = st.builds(BlockLoad, st.integers(0, 12), st.integers(1, 3))
LOADS = st.builds(
    RankLoad,
    linear=st.integers(0, 60),
    attention=st.integers(0, 30),
    wire=st.integers(0, 90),
    blocks=st.lists(BLOCKS, max_size=2).map(lambda blocks: tuple(blocks)),
)
UNITS = st.builds(UnitCosts, st.integers(1, 6), st.integers(1, 6))


def cost(load: RankLoad, lengths: Sequence[int], unit: UnitCosts) -> int:
    """Of each row its linear maps; its keys (upstream, earlier ones, itself), or the wire."""
    attention = load.attention + sum(
        unit.pair * sum(range(block.upstream + 1, block.upstream + length + 1))
        for block, length in zip(load.blocks, lengths, strict=True)
    )
    return load.linear + unit.row * sum(lengths) + max(attention, load.wire)


def all_lengths(blocks: Sequence[BlockLoad], num_tokens: int) -> Iterator[list[int]]:
    """Every way to share out the tokens that leaves no block too short."""
    if not blocks:
        if num_tokens == 0:
            yield []
        return
    for length in range(blocks[0].min_len, num_tokens + 1):
        for others in all_lengths(blocks[1:], num_tokens - length):
            yield [length, *others]


def per_rank(loads: Sequence[RankLoad], lengths: Sequence[int]) -> list[list[int]]:
    rest = iter(lengths)
    return [[next(rest) for _ in load.blocks] for load in loads]


def slowest(loads: Sequence[RankLoad], shares: Sequence[Sequence[int]], unit: UnitCosts) -> int:
    return max(cost(load, share, unit) for load, share in zip(loads, shares, strict=True))


@settings(deadline=None)
@given(loads=st.lists(LOADS, min_size=1, max_size=3), spare=st.integers(0, 6), unit=UNITS)
def test_no_other_cut_makes_the_slowest_rank_faster(
    loads: list[RankLoad], spare: int, unit: UnitCosts
) -> None:
    blocks = [block for load in loads for block in load.blocks]
    assume(blocks)
    num_tokens = sum(block.min_len for block in blocks) + spare
    shares = balance(num_tokens, loads, unit)
    assert sum(map(sum, shares)) == num_tokens
    for load, share in zip(loads, shares, strict=True):
        pairs = zip(share, load.blocks, strict=True)
        assert all(length >= block.min_len for length, block in pairs)
    best = min(
        slowest(loads, per_rank(loads, lengths), unit)
        for lengths in all_lengths(blocks, num_tokens)
    )
    assert slowest(loads, shares, unit) == best
    assert balance(num_tokens, loads, unit) == shares


@given(blocks=st.lists(BLOCKS, min_size=1, max_size=4), spare=st.integers(0, 14), unit=UNITS)
def test_no_other_lengths_cost_a_rank_less_and_earlier_blocks_get_the_rest(
    blocks: list[BlockLoad], spare: int, unit: UnitCosts
) -> None:
    load = RankLoad(7, tuple(blocks), attention=5)
    num_tokens = load.min_tokens + spare
    every = list(all_lengths(blocks, num_tokens))
    cheapest = min(cost(load, lengths, unit) for lengths in every)
    assert cheapest_lengths(load, num_tokens) == max(
        lengths for lengths in every if cost(load, lengths, unit) == cheapest
    )


def test_a_rank_without_a_block_takes_no_token() -> None:
    idle, busy = RankLoad(5, ()), RankLoad(0, (BlockLoad(0, 1),))
    assert balance(9, [idle, busy, idle], UnitCosts(1, 1)) == [[], [9], []]
    assert cheapest_lengths(idle, 0) == []


@pytest.mark.parametrize("loads", [[], [RankLoad(5, ())]], ids=["no_rank", "no_block"])
def test_tokens_without_a_block_are_refused(loads: list[RankLoad]) -> None:
    with pytest.raises(ValueError, match="3 tokens do not fit"):
        balance(3, loads, UnitCosts(1, 1))


def test_fewer_tokens_than_the_shortest_blocks_hold_are_refused() -> None:
    loads = [RankLoad(0, (BlockLoad(0, 4), BlockLoad(2, 1))), RankLoad(0, (BlockLoad(9, 3),))]
    with pytest.raises(ValueError, match="7 tokens do not fit blocks of 8 tokens"):
        balance(7, loads, UnitCosts(1, 1))
    assert balance(8, loads, UnitCosts(1, 1)) == [[4, 1], [3]]


def assert_level(
    loads: Sequence[RankLoad], shares: Sequence[Sequence[int]], unit: UnitCosts
) -> None:
    """No token could move to a rank that would then still be faster than its old one was."""
    pairs = list(zip(loads, shares, strict=True))
    givers = [cost(load, share, unit) for load, share in pairs if sum(share) > load.min_tokens]
    takers = [
        cost(load, cheapest_lengths(load, sum(share) + 1), unit)
        for load, share in pairs
        if load.blocks
    ]
    assert max(givers, default=0) <= min(takers)


@settings(deadline=None)
@given(loads=st.lists(LOADS, min_size=1, max_size=4), spare=st.integers(0, 40), unit=UNITS)
@example([RankLoad(0, (BlockLoad(0, 1),))] * 4, 5, UnitCosts(1, 1))
@example(
    [RankLoad(900, (BlockLoad(0, 1),)), *[RankLoad(0, (BlockLoad(0, 1),))] * 2], 9, UnitCosts(1, 1)
)
def test_ranks_are_level_to_one_token_where_they_have_tokens_to_give(
    loads: list[RankLoad], spare: int, unit: UnitCosts
) -> None:
    assume(any(load.blocks for load in loads))
    num_tokens = sum(load.min_tokens for load in loads) + spare
    assert_level(loads, balance(num_tokens, loads, unit), unit)


@settings(max_examples=20, deadline=None)
@given(
    anchor_len=st.integers(0, 4000),
    passing_len=st.integers(0, 2000),
    fixed=st.integers(0, 10**8),
    blocks_per_rank=st.integers(1, 3),
    num_tokens=st.integers(131_000, 131_072),
    unit=st.builds(UnitCosts, st.integers(1, 200_000), st.integers(1, 20)),
)
def test_ranks_of_a_long_document_are_level_to_one_token(
    anchor_len: int,
    passing_len: int,
    fixed: int,
    blocks_per_rank: int,
    num_tokens: int,
    unit: UnitCosts,
) -> None:
    """On blocks like those of `apb`: block b sees the anchor and b passing blocks."""
    blocks = [
        BlockLoad(anchor_len * (index > 0) + passing_len * index, max(1, passing_len))
        for index in range(8 * blocks_per_rank)
    ]
    loads = [RankLoad(fixed * (rank == 0), tuple(blocks[rank::8])) for rank in range(8)]
    assert_level(loads, balance(num_tokens, loads, unit), unit)
