"""Star Attention's first phase: every block attends to the first block and to itself."""

from __future__ import annotations

from dataclasses import dataclass

from apb.layout import SequenceLayout, choose_num_blocks
from apb.methods.base import MethodConfig
from apb.methods.blocks import BlockMethod
from apb.methods.plan import Anchor, AnchorForm, PrefillPlan
from apb.prompts.base import PromptTokens


class StarMethod(BlockMethod):
    """Approximate (Acharya et al. 2024, https://arxiv.org/abs/2411.17116): no passing blocks."""

    def __init__(self, *, min_block_len: int, anchor_form: AnchorForm) -> None:
        super().__init__()
        self._min_block_len = min_block_len
        self._anchor_form = anchor_form

    def plan(self, prompt: PromptTokens, *, world_size: int, num_blocks: int | None) -> PrefillPlan:
        context_len = len(prompt.context_ids)
        count = choose_num_blocks(
            context_len,
            requested=num_blocks,
            world_size=world_size,
            min_block_len=self._min_block_len,
        )
        layout = SequenceLayout.even(context_len, num_blocks=count, world_size=world_size)
        anchor = Anchor(context_len=len(layout.blocks[0])) if count > 1 else Anchor()
        return PrefillPlan(layout, anchor, self._anchor_form, (0,) * count)


@dataclass(kw_only=True, slots=True)
class StarConfig(MethodConfig):
    """Config of `StarMethod`. `anchor=replicated` is the paper's: nothing is exchanged."""

    anchor: AnchorForm = AnchorForm.replicated
    min_block_len: int = 256

    def build(self, *, seed: int) -> StarMethod:
        return StarMethod(min_block_len=self.min_block_len, anchor_form=self.anchor)
