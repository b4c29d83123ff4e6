"""Star Attention's first phase: every block attends to the first block and to itself."""

from __future__ import annotations

from dataclasses import dataclass

from apb.methods.blocks import BlockConfig, BlockMethod
from apb.methods.plan import Anchor, AnchorForm, PrefillPlan, cut_context
from apb.prompts.base import PromptTokens


class StarMethod(BlockMethod):
    """Approximate (Acharya et al. 2024, https://arxiv.org/abs/2411.17116): no passing blocks."""

    def __init__(self, *, min_block_len: int, anchor_form: AnchorForm) -> None:
        super().__init__()
        self._min_block_len = min_block_len
        self._anchor_form = anchor_form

    def plan(self, prompt: PromptTokens, *, world_size: int, num_blocks: int | None) -> PrefillPlan:
        layout, notes = cut_context(
            len(prompt.context_ids),
            num_blocks=num_blocks,
            world_size=world_size,
            min_block_len=self._min_block_len,
        )
        count = len(layout.blocks)
        anchor = Anchor(context_len=len(layout.blocks[0])) if count > 1 else Anchor()
        return PrefillPlan(layout, anchor, self._anchor_form, (0,) * count, notes)


@dataclass(kw_only=True, slots=True)
class StarConfig(BlockConfig):
    """Config of `StarMethod`. `anchor=replicated` is the paper's: nothing is exchanged."""

    anchor: AnchorForm = AnchorForm.replicated

    def build(self, *, seed: int) -> StarMethod:
        return StarMethod(min_block_len=self.min_block_len, anchor_form=self.anchor)
