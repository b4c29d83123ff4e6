"""Star Attention's first phase: every block attends to the first block and to itself."""

from __future__ import annotations

from dataclasses import dataclass

from apb.layout import LayoutPolicy, SequenceLayout
from apb.methods.balanced import balanced_behind_anchor
from apb.methods.blocks import BlockConfig, BlockMethod
from apb.methods.plan import Anchor, AnchorForm, PlanRequest, PrefillPlan, cut_context


class StarMethod(BlockMethod):
    """Approximate (Acharya et al. 2024, https://arxiv.org/abs/2411.17116): no passing blocks."""

    def plan(self, request: PlanRequest) -> PrefillPlan:
        layout, notes = cut_context(
            request, self._settings.layout, min_block_len=self._settings.min_block_len
        )
        count = len(layout.blocks)
        if count == 1:
            return PrefillPlan(layout, passing_lens=(0,), notes=notes)

        def plan_of(layout: SequenceLayout) -> PrefillPlan:
            anchor = Anchor(context_len=len(layout.blocks[0]))
            return PrefillPlan(layout, anchor, self._settings.anchor, (0,) * count, notes)

        if self._settings.layout is not LayoutPolicy.balanced:
            return plan_of(layout)
        return balanced_behind_anchor(
            lambda first_len: plan_of(_with_first(layout, first_len)),
            request.costs,
            longest=request.context_len - count + 1,
        )


def _with_first(layout: SequenceLayout, first_len: int) -> SequenceLayout:
    """Block 0 with that many tokens, the others sharing what remains."""
    rest = SequenceLayout.even(
        layout.context_len - first_len, num_blocks=len(layout.blocks) - 1, world_size=1
    )
    return layout.with_lengths([first_len, *map(len, rest.blocks)])


@dataclass(kw_only=True, slots=True)
class StarConfig(BlockConfig):
    """Config of `StarMethod`. `anchor=replicated` is the paper's: nothing is exchanged."""

    anchor: AnchorForm = AnchorForm.replicated

    def build(self, *, seed: int) -> StarMethod:
        return StarMethod(self.settings())
