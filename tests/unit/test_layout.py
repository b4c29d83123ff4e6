"""Guarantees of layouts: every context token in exactly one block, whatever the numbers (E1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.errors import InputError
from apb.layout import LayoutPolicy, SequenceLayout, choose_num_blocks

WORLD_SIZES = st.integers(1, 8)


def assert_partition(layout: SequenceLayout, context_len: int, world_size: int) -> None:
    tokens = [
        t
        for rank in range(world_size)
        for b in layout.owned_by(rank)
        for t in range(b.start, b.stop)
    ]
    assert sorted(tokens) == list(range(context_len))
    assert [layout.tokens_on(rank) for rank in range(world_size)] == [
        sum(len(block) for block in layout.blocks if block.rank == rank)
        for rank in range(world_size)
    ]
    assert [block.index for block in layout.blocks] == list(range(len(layout.blocks)))
    assert layout.max_block_len == max(block.stop - block.start for block in layout.blocks)


@given(data=st.data(), context_len=st.integers(1, 400), world_size=WORLD_SIZES)
def test_even_blocks_partition_the_context_and_differ_by_at_most_one(
    data: st.DataObject, context_len: int, world_size: int
) -> None:
    num_blocks = data.draw(st.integers(1, context_len))
    layout = SequenceLayout.even(context_len, num_blocks=num_blocks, world_size=world_size)
    assert_partition(layout, context_len, world_size)
    lengths = [len(block) for block in layout.blocks]
    assert len(lengths) == num_blocks
    assert max(lengths) - min(lengths) <= 1


@given(data=st.data(), context_len=st.integers(1, 400), world_size=WORLD_SIZES)
def test_even_blocks_are_shared_out_in_order_and_fairly(
    data: st.DataObject, context_len: int, world_size: int
) -> None:
    num_blocks = data.draw(st.integers(1, context_len))
    layout = SequenceLayout.even(context_len, num_blocks=num_blocks, world_size=world_size)
    assert_shared_out_in_order(layout, world_size)


def assert_shared_out_in_order(layout: SequenceLayout, world_size: int) -> None:
    ranks = [block.rank for block in layout.blocks]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    shares = [len(layout.owned_by(rank)) for rank in range(world_size)]
    assert max(shares) - min(shares) <= 1


@given(data=st.data(), context_len=st.integers(1, 400), dealt_to=WORLD_SIZES)
def test_blocks_that_other_ranks_read_stay_as_they_are(
    data: st.DataObject, context_len: int, dealt_to: int
) -> None:
    num_blocks = data.draw(st.integers(1, min(30, context_len)))
    layout = SequenceLayout.zigzag(context_len, num_blocks=num_blocks, world_size=8)
    dealt = layout.dealt_to(dealt_to)
    assert_partition(dealt, context_len, dealt_to)
    assert_shared_out_in_order(dealt, dealt_to)
    assert [*map(len, dealt.blocks)] == [*map(len, layout.blocks)]


@given(
    owners=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 7)), min_size=1, max_size=20),
    spare=st.integers(0, 3),
)
def test_blocks_of_any_lengths_on_any_ranks_partition_the_context(
    owners: list[tuple[int, int]], spare: int
) -> None:
    lengths, ranks = zip(*owners, strict=True)
    world_size = max(ranks) + 1 + spare
    layout = SequenceLayout.from_lengths(lengths, ranks, world_size=world_size)
    assert_partition(layout, sum(lengths), world_size)
    assert [len(block) for block in layout.blocks] == list(lengths)
    assert [block.rank for block in layout.blocks] == list(ranks)


@pytest.mark.parametrize(
    ("lengths", "ranks"), [((3, 0), (0, 0)), ((3, 1), (0, 2)), ((3, 1), (0, -1))]
)
def test_empty_blocks_and_unknown_ranks_are_refused(
    lengths: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    with pytest.raises(AssertionError):
        SequenceLayout.from_lengths(lengths, ranks, world_size=2)


@given(context_len=st.integers(1, 5000), world_size=WORLD_SIZES, min_block_len=st.integers(1, 600))
def test_default_is_the_most_blocks_up_to_one_per_rank_that_are_long_enough(
    context_len: int, world_size: int, min_block_len: int
) -> None:
    num_blocks = choose_num_blocks(
        context_len, requested=None, world_size=world_size, min_block_len=min_block_len
    )
    assert 1 <= num_blocks <= world_size
    assert num_blocks == 1 or context_len >= num_blocks * min_block_len
    assert num_blocks == world_size or context_len < (num_blocks + 1) * min_block_len


@given(context_len=st.integers(1, 300), world_size=WORLD_SIZES, extra=st.integers(0, 300))
def test_requested_number_is_honoured_while_every_block_gets_a_token(
    context_len: int, world_size: int, extra: int
) -> None:
    requested = world_size + extra
    num_blocks = choose_num_blocks(
        context_len, requested=requested, world_size=world_size, min_block_len=10**6
    )
    assert num_blocks == min(requested, context_len)


@given(data=st.data(), world_size=st.integers(2, 8))
def test_fewer_blocks_than_ranks_are_refused(data: st.DataObject, world_size: int) -> None:
    requested = data.draw(st.integers(1, world_size - 1))
    with pytest.raises(
        InputError, match=rf"num_blocks={requested} is below the {world_size} ranks"
    ):
        choose_num_blocks(1000, requested=requested, world_size=world_size, min_block_len=1)


@given(context_len=st.integers(1, 400), world_size=WORLD_SIZES)
def test_zigzag_of_two_blocks_per_rank_pairs_early_ones_with_late_ones(
    context_len: int, world_size: int
) -> None:
    num_blocks = 2 * world_size
    layout = SequenceLayout.zigzag(
        max(context_len, num_blocks), num_blocks=num_blocks, world_size=world_size
    )
    for rank in range(world_size):
        owned = [block.index for block in layout.owned_by(rank)]
        assert owned == [rank, 2 * world_size - 1 - rank]


@given(data=st.data(), context_len=st.integers(1, 400), world_size=WORLD_SIZES)
def test_zigzag_partitions_the_context_into_even_blocks(
    data: st.DataObject, context_len: int, world_size: int
) -> None:
    num_blocks = data.draw(st.integers(1, context_len))
    layout = SequenceLayout.zigzag(context_len, num_blocks=num_blocks, world_size=world_size)
    assert_partition(layout, context_len, world_size)
    even = SequenceLayout.even(context_len, num_blocks=num_blocks, world_size=1)
    assert [len(block) for block in layout.blocks] == [len(block) for block in even.blocks]
    shares = [len(layout.owned_by(rank)) for rank in range(world_size)]
    assert max(shares) - min(shares) <= 1


@given(pairs=st.integers(1, 4), world_size=WORLD_SIZES)
def test_zigzag_gives_every_rank_the_same_causal_work(pairs: int, world_size: int) -> None:
    num_blocks = 2 * world_size * pairs
    layout = SequenceLayout.zigzag(10 * num_blocks, num_blocks=num_blocks, world_size=world_size)
    works = {
        sum(token + 1 for b in layout.owned_by(rank) for token in range(b.start, b.stop))
        for rank in range(world_size)
    }
    assert len(works) == 1


@given(data=st.data(), world_size=WORLD_SIZES, num_blocks=st.integers(1, 12))
def test_other_lengths_leave_blocks_on_their_ranks(
    data: st.DataObject, world_size: int, num_blocks: int
) -> None:
    layout = SequenceLayout.zigzag(100, num_blocks=num_blocks, world_size=world_size)
    lengths = data.draw(
        st.lists(st.integers(1, 30), min_size=num_blocks, max_size=num_blocks), label="lengths"
    )
    other = layout.with_lengths(lengths)
    assert_partition(other, sum(lengths), world_size)
    assert [len(block) for block in other.blocks] == lengths
    assert [block.rank for block in other.blocks] == [block.rank for block in layout.blocks]


def test_other_lengths_for_other_blocks_are_refused() -> None:
    layout = SequenceLayout.even(10, num_blocks=2, world_size=2)
    with pytest.raises(ValueError, match="zip"):
        layout.with_lengths([3, 3, 4])


@given(context_len=st.integers(1, 300), world_size=WORLD_SIZES, min_block_len=st.integers(1, 40))
def test_default_of_zigzag_is_two_blocks_per_rank_while_they_are_long_enough(
    context_len: int, world_size: int, min_block_len: int
) -> None:
    num_blocks = choose_num_blocks(
        context_len,
        requested=None,
        world_size=world_size,
        min_block_len=min_block_len,
        policy=LayoutPolicy.zigzag,
    )
    assert num_blocks == max(1, min(2 * world_size, context_len // min_block_len))


@given(world_size=WORLD_SIZES, requested=st.integers(1, 60), context_len=st.integers(1, 300))
def test_zigzag_takes_pairs_of_blocks_and_names_the_nearest_number_that_can_be_dealt(
    world_size: int, requested: int, context_len: int
) -> None:
    def choose(number: int) -> int:
        return choose_num_blocks(
            context_len, requested=number, world_size=world_size, policy=LayoutPolicy.zigzag
        )

    pairs = 2 * world_size
    if requested % pairs == 0:
        assert choose(requested) == min(requested, context_len)
        return
    with pytest.raises(InputError, match=f"num_blocks={requested} ") as refusal:
        choose(requested)
    assert "\n" not in str(refusal.value)
    offered = int(str(refusal.value).split()[-1])
    assert choose(offered) == min(offered, context_len)
    every = range(pairs, 100 + pairs, pairs)
    assert abs(offered - requested) == min(abs(number - requested) for number in every)
