"""Dense causal attention on one rank: the baseline that every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from apb.errors import InputError
from apb.layout import SequenceLayout
from apb.methods.base import MethodConfig
from apb.methods.blocks import BlockMethod
from apb.methods.plan import PrefillPlan
from apb.prompts.base import PromptTokens


class FullMethod(BlockMethod):
    """Exact: rank 0 runs and caches the context as one block, and the other ranks hold nothing."""

    def plan(self, prompt: PromptTokens, *, world_size: int, num_blocks: int | None) -> PrefillPlan:
        if num_blocks not in (None, 1):
            raise InputError(
                f"num_blocks={num_blocks} does not apply to method=full, which runs one block: "
                "drop num_blocks or choose method=apb"
            )
        context_len = len(prompt.context_ids)
        return PrefillPlan(SequenceLayout.even(context_len, num_blocks=1, world_size=world_size))


@dataclass(kw_only=True, slots=True)
class FullConfig(MethodConfig):
    """Config of `FullMethod`."""

    def build(self, *, seed: int) -> FullMethod:
        return FullMethod()
