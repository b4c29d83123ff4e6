"""Which rank holds which context token: integers only, so one process can reason about all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from apb.errors import InputError


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous slice ``[start, stop)`` of the context, run and cached by one rank."""

    index: int
    start: int
    stop: int
    rank: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The blocks of a context, in order; together they hold every context token exactly once.

    Blocks may differ in length, a rank may own several of them (not necessarily neighbours), and
    ranks without a block hold an empty shard.
    """

    context_len: int
    world_size: int
    blocks: tuple[Block, ...]
    _owned: tuple[tuple[Block, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        edges = [0, *(block.stop for block in self.blocks)]
        assert [block.start for block in self.blocks] == edges[:-1], "blocks leave a gap or overlap"
        assert edges[-1] == self.context_len, "blocks do not end where the context ends"
        assert all(len(block) > 0 for block in self.blocks), "a block without a token"
        assert all(0 <= block.rank < self.world_size for block in self.blocks)
        owned: list[list[Block]] = [[] for _ in range(self.world_size)]
        for block in self.blocks:
            owned[block.rank].append(block)
        object.__setattr__(self, "_owned", tuple(map(tuple, owned)))

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], ranks: Sequence[int], *, world_size: int
    ) -> SequenceLayout:
        """Blocks of the given lengths, block ``i`` on ``ranks[i]``."""
        edges = [0]
        for length in lengths:
            edges.append(edges[-1] + length)
        blocks = tuple(
            Block(index, start, stop, rank)
            for index, ((start, stop), rank) in enumerate(zip(pairwise(edges), ranks, strict=True))
        )
        return cls(edges[-1], world_size, blocks)

    @classmethod
    def even(cls, context_len: int, *, num_blocks: int, world_size: int) -> SequenceLayout:
        """Blocks whose lengths differ by at most one token, neighbours on the same rank (paper)."""
        lengths = [
            (index + 1) * context_len // num_blocks - index * context_len // num_blocks
            for index in range(num_blocks)
        ]
        return cls.from_lengths(lengths, _neighbours(num_blocks, world_size), world_size=world_size)

    @classmethod
    def zigzag(cls, context_len: int, *, num_blocks: int, world_size: int) -> SequenceLayout:
        """Even blocks dealt to ranks 0 .. R-1 and back, R-1 .. 0, and so on.

        With 2R blocks rank r owns blocks r and 2R-1-r: early and late ones, whose attention adds up
        to the same on every rank.
        """
        even = cls.even(context_len, num_blocks=num_blocks, world_size=1)
        turns = (index % (2 * world_size) for index in range(num_blocks))
        ranks = [min(turn, 2 * world_size - 1 - turn) for turn in turns]
        return cls.from_lengths([*map(len, even.blocks)], ranks, world_size=world_size)

    def with_lengths(self, lengths: Sequence[int]) -> SequenceLayout:
        """The same blocks on the same ranks in other lengths."""
        ranks = [block.rank for block in self.blocks]
        return self.from_lengths(lengths, ranks, world_size=self.world_size)

    def dealt_to(self, world_size: int) -> SequenceLayout:
        """The same blocks on another number of ranks, neighbours on the same one."""
        lengths, ranks = [*map(len, self.blocks)], _neighbours(len(self.blocks), world_size)
        return self.from_lengths(lengths, ranks, world_size=world_size)

    def owned_by(self, rank: int) -> tuple[Block, ...]:
        return self._owned[rank]

    def tokens_on(self, rank: int) -> int:
        return sum(len(block) for block in self.owned_by(rank))

    @property
    def max_block_len(self) -> int:
        return max(map(len, self.blocks))


def _neighbours(num_blocks: int, world_size: int) -> list[int]:
    """The rank of each block, where ranks own neighbouring blocks and about as many each."""
    spread = max(num_blocks, world_size)
    return [index * world_size // spread for index in range(num_blocks)]


class LayoutPolicy(Enum):
    """How blocks are cut and dealt to ranks.

    `even`: equal lengths, neighbours on one rank (paper). `balanced`: the same ranks, lengths such
    that the slowest rank is as fast as possible. `zigzag`: equal lengths, early blocks paired with
    late ones.
    """

    even = "even"
    balanced = "balanced"
    zigzag = "zigzag"


def choose_num_blocks(
    context_len: int,
    *,
    requested: int | None,
    world_size: int,
    min_block_len: int = 1,
    policy: LayoutPolicy = LayoutPolicy.even,
) -> int:
    """How many blocks to cut `context_len` tokens into; at least one, each with at least one token.

    A requested number is honoured while every block gets a token. Otherwise it is one block per
    rank (`zigzag`: two), or fewer where blocks would fall below `min_block_len` tokens.

    Raises:
        InputError: fewer blocks requested than there are ranks, or unpaired ones under `zigzag`.
    """
    pairs = 2 * world_size
    if requested is None:
        wanted = pairs if policy is LayoutPolicy.zigzag else world_size
        return max(1, min(wanted, context_len // max(1, min_block_len)))
    if policy is LayoutPolicy.zigzag and requested % pairs:
        nearest = max(pairs, round(requested / pairs) * pairs)
        raise InputError(
            f"num_blocks={requested} cannot be dealt out in zigzag, which gives each of the "
            f"{world_size} ranks blocks in pairs: the nearest number that can is {nearest}"
        )
    if requested < world_size:
        raise InputError(
            f"num_blocks={requested} is below the {world_size} ranks, so some ranks would have no "
            f"work: raise num_blocks to at least {world_size} or start fewer ranks"
        )
    return min(requested, context_len)
