"""Star Attention's first phase: every block attends to the first block and to itself."""

from __future__ import annotations

from dataclasses import dataclass

from apb.layout import LayoutPolicy
from apb.methods.balanced import balanced
from apb.methods.blocks import BlockConfig, BlockMethod
from apb.methods.plan import Anchor, AnchorForm, PlanRequest, PrefillPlan, cut_context


class StarMethod(BlockMethod):
    """Approximate (Acharya et al. 2024, https://arxiv.org/abs/2411.17116): no passing blocks.

    The anchor is as long as an even block, also where `balanced` makes block 0 longer.
    """

    def plan(self, request: PlanRequest) -> PrefillPlan:
        layout, notes = cut_context(
            request, self._settings.layout, min_block_len=self._settings.min_block_len
        )
        count = len(layout.blocks)
        anchor = Anchor(context_len=len(layout.blocks[0])) if count > 1 else Anchor()
        plan = PrefillPlan(layout, anchor, self._settings.anchor, (0,) * count, notes=notes)
        if self._settings.layout is LayoutPolicy.balanced and count > 1:
            return balanced(plan, request.costs, self._settings.wire)
        return plan


@dataclass(kw_only=True, slots=True)
class StarConfig(BlockConfig):
    """Config of `StarMethod`. `anchor=replicated` is the paper's: nothing is exchanged."""

    anchor: AnchorForm = AnchorForm.replicated

    def build(self, *, seed: int) -> StarMethod:
        return StarMethod(self.settings())
