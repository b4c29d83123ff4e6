"""Dense causal attention on one rank: the baseline that every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from apb.errors import InputError
from apb.layout import SequenceLayout
from apb.methods.base import MethodConfig
from apb.methods.blocks import BlockMethod, BlockSettings
from apb.methods.plan import PlanRequest, PrefillPlan


class FullMethod(BlockMethod):
    """Exact: rank 0 runs and caches the context as one block, and the other ranks hold nothing."""

    def plan(self, request: PlanRequest) -> PrefillPlan:
        if request.num_blocks not in (None, 1):
            raise InputError(
                f"num_blocks={request.num_blocks} does not apply to method=full, which runs one "
                "block: drop num_blocks or choose method=apb"
            )
        return PrefillPlan(
            SequenceLayout.even(request.context_len, num_blocks=1, world_size=request.world_size),
            passing_lens=(0,),
        )


@dataclass(kw_only=True, slots=True)
class FullConfig(MethodConfig):
    """Config of `FullMethod`."""

    def build(self, *, seed: int) -> FullMethod:
        return FullMethod(BlockSettings())
