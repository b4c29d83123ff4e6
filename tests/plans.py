"""Plans for tests: what a method's config makes of a prompt."""

from __future__ import annotations

from apb.cost import NOMINAL_CPU, CostModel, ModelShape, Rates
from apb.methods.base import MethodConfig
from apb.methods.plan import PlanRequest, PrefillPlan
from apb.prompts.base import PromptTokens

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=260,
)
LLAMA_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def make_plan(
    config: MethodConfig,
    prompt: PromptTokens,
    *,
    world_size: int,
    num_blocks: int | None = None,
    shape: ModelShape = SHAPE,
    rates: Rates = NOMINAL_CPU,
) -> PrefillPlan:
    costs = CostModel(shape=shape, rates=rates, itemsize=4)
    return config.build(seed=0).plan(
        PlanRequest.of(prompt, world_size=world_size, num_blocks=num_blocks, costs=costs)
    )
