"""What a prefill will do, as integers: blocks, anchor, passing lengths and each rank's rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from apb.cost import CostModel
from apb.layout import Block, LayoutPolicy, SequenceLayout, choose_num_blocks
from apb.prompts.base import PromptTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a plan may depend on: lengths, ranks, and what they cost. The same on every rank."""

    context_len: int
    world_size: int
    costs: CostModel
    prefix_len: int = 0
    query_len: int = 0
    num_blocks: int | None = None
    """As the user gave it."""

    @classmethod
    def of(
        cls, prompt: PromptTokens, *, world_size: int, num_blocks: int | None, costs: CostModel
    ) -> PlanRequest:
        return cls(
            context_len=len(prompt.context_ids),
            prefix_len=len(prompt.prefix_ids),
            query_len=len(prompt.query_ids),
            world_size=world_size,
            num_blocks=num_blocks,
            costs=costs,
        )


class AnchorForm(Enum):
    """Where the anchor runs: on every rank that reads it, or once, its KV travelling."""

    replicated = "replicated"
    shared = "shared"


@dataclass(frozen=True, slots=True)
class Anchor:
    """The tokens that every block but the first attends to besides its own and the passing blocks.

    They are the first `context_len` tokens of the context with the last `query_len` tokens of the
    query spliced in at `splice`, at positions ``0 .. len(anchor) - 1`` (paper section 3.3).
    """

    context_len: int = 0
    query_len: int = 0
    splice: int = 0

    def __len__(self) -> int:
        return self.context_len + self.query_len

    @property
    def query_rows(self) -> slice:
        return slice(self.splice, self.splice + self.query_len)

    def token_ids(self, context_ids: Sequence[int], query_ids: Sequence[int]) -> list[int]:
        spliced = list(query_ids[len(query_ids) - self.query_len :])
        return [
            *context_ids[: self.splice],
            *spliced,
            *context_ids[self.splice : self.context_len],
        ]


@dataclass(frozen=True, slots=True)
class RankRows:
    """The packed sequence that one rank runs: its anchor copy, if any, then its blocks in order."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    anchor: slice
    local: slice
    blocks: tuple[tuple[Block, slice], ...]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One prefill, the same on every rank.

    `passing_lens[b]` is what block ``b`` sends per KV head, on average over layers; 0 for the last
    block, which nobody follows. `layer_passing_lens[layer]` is the same for one layer, where layers
    differ (see `in_layer`). `notes` are sentences for the user about what differs from the request.
    `method` is what was chosen where the method chooses.
    """

    layout: SequenceLayout
    anchor: Anchor = Anchor()
    anchor_form: AnchorForm = AnchorForm.replicated
    passing_lens: tuple[int, ...] = ()
    layer_passing_lens: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()
    method: str | None = None

    def in_layer(self, layer_idx: int) -> PrefillPlan:
        """The plan as if all layers were as this one."""
        if not self.layer_passing_lens:
            return self
        passing_lens = self.layer_passing_lens[layer_idx]
        return replace(self, passing_lens=passing_lens, layer_passing_lens=())

    def most_passed(self, block: Block) -> int:
        """What the block sends in the layer where it sends most."""
        layers = (self.passing_lens, *self.layer_passing_lens)
        return max(passing_lens[block.index] for passing_lens in layers)

    def excluded(self, block: Block) -> int:
        """How many of the block's first tokens may not be selected, as every anchor shows them."""
        return min(self.anchor.context_len, len(block)) if block.index == 0 else 0

    def upstream_len(self, block_index: int) -> int:
        """Keys that a block sees before its own: the anchor and all earlier passing blocks."""
        return (len(self.anchor) if block_index else 0) + sum(self.passing_lens[:block_index])

    def runs_anchor(self, rank: int) -> bool:
        """Whether the rank computes the anchor rather than receiving it or not needing it."""
        if not len(self.anchor):
            return False
        if self.anchor_form is AnchorForm.shared:
            return rank == self.layout.blocks[0].rank
        return any(block.index > 0 for block in self.layout.owned_by(rank))

    def copied_anchor(self, rank: int) -> int:
        """Anchor tokens that the rank runs beside its blocks: none where block 0 is the anchor."""
        copied = self.runs_anchor(rank) and not self._anchor_is_block_0(rank)
        return len(self.anchor) if copied else 0

    def num_rows(self, rank: int) -> int:
        """How many tokens the rank runs: its blocks, and its copy of the anchor."""
        return self.layout.tokens_on(rank) + self.copied_anchor(rank)

    @property
    def passes_everything(self) -> bool:
        """Whether every block but the last passes on all that the anchor does not show."""
        *others, _ = self.layout.blocks
        return all(
            self.passing_lens[block.index] == len(block) - self.excluded(block) for block in others
        )

    def received_tokens(self, rank: int) -> int:
        """Upstream keys per KV head that come to the rank from other ranks, in each layer."""
        last = self.last_block(rank)
        passing = sum(
            self.passing_lens[block.index]
            for block in self.layout.blocks[:last]
            if block.rank != rank
        )
        comes = last > 0 and not self.runs_anchor(rank)
        return passing + (len(self.anchor) if comes else 0)

    def last_block(self, rank: int) -> int:
        """The rank's last block; it sees the most upstream keys. 0 for a rank without a block."""
        return max((block.index for block in self.layout.owned_by(rank)), default=0)

    def _anchor_is_block_0(self, rank: int) -> bool:
        """Without the query the anchor is the beginning of block 0, its owner's copy then."""
        return self.anchor.query_len == 0 and self.layout.blocks[0].rank == rank

    def rows(self, rank: int, context_ids: Sequence[int], query_ids: Sequence[int]) -> RankRows:
        owned = self.layout.owned_by(rank)
        token_ids: list[int] = []
        positions: list[int] = []
        anchor = slice(0, 0)
        if self.runs_anchor(rank):
            anchor = slice(0, len(self.anchor))
            if not self._anchor_is_block_0(rank):
                token_ids += self.anchor.token_ids(context_ids, query_ids)
                positions += range(len(self.anchor))
        local_start = len(token_ids)
        blocks = []
        for block in owned:
            start = len(token_ids)
            token_ids += context_ids[block.start : block.stop]
            positions += range(block.start, block.stop)
            blocks.append((block, slice(start, len(token_ids))))
        local = slice(local_start, len(token_ids))
        return RankRows(tuple(token_ids), tuple(positions), anchor, local, tuple(blocks))


class Reduced(NamedTuple):
    """Ranks that read the blocks of a larger gang, of which some ranks were lost."""

    world_size: int
    """Of the larger gang."""
    cause: str
    """Who was lost, as a sentence."""

    def dealt(self, plan: PrefillPlan, world_size: int) -> PrefillPlan:
        """The larger gang's plan on the ranks that are left, with a note.

        Any method runs it: what block b computes does not depend on the rank that it is on.
        """
        layout = plan.layout.dealt_to(world_size)
        note = (
            f"{self.cause}, so that {world_size} of {self.world_size} ranks read "
            f"{len(layout.blocks)} blocks"
        )
        return replace(plan, layout=layout, notes=(*plan.notes, note))


def cut_context(
    request: PlanRequest, policy: LayoutPolicy, *, min_block_len: int
) -> tuple[SequenceLayout, tuple[str, ...]]:
    """Even blocks on the policy's ranks, and a note where they are fewer than asked for.

    Raises:
        InputError: the policy cannot deal out `num_blocks`.
    """
    context_len, world_size = request.context_len, request.world_size
    count, wanted = (
        choose_num_blocks(
            length,
            requested=request.num_blocks,
            world_size=world_size,
            min_block_len=min_block_len,
            policy=policy,
        )
        for length in (context_len, sys.maxsize)
    )
    cut = SequenceLayout.zigzag if policy is LayoutPolicy.zigzag else SequenceLayout.even
    layout = cut(context_len, num_blocks=count, world_size=world_size)
    if count == wanted:
        return layout, ()
    reason = (
        "every block needs a token"
        if request.num_blocks
        else f"method.min_block_len={min_block_len}"
    )
    idle = max(0, world_size - count)
    note = f"{context_len} context tokens fill {count} of {wanted} blocks ({reason})"
    return layout, (f"{note}: {idle} ranks only take part in decoding" if idle else note,)
