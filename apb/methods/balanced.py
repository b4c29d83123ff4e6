"""Plans whose block lengths make the slowest rank as fast as possible (design section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from apb.balance import BlockLoad, RankLoad, UnitCosts, balance, causal_pairs, rank_cost
from apb.cost import CostModel
from apb.methods.plan import PrefillPlan

_CANDIDATES = 32
"""First-block lengths that are tried at once."""


def balanced(plan: PrefillPlan, costs: CostModel, *, pinned: int = 0) -> PrefillPlan:
    """The plan with other block lengths on the same ranks; anchor and passing lengths stay.

    No block gets shorter than what it shows in the anchor and passes on, so every block sees as
    many upstream keys as before. The first `pinned` blocks keep their length.
    """
    lengths = [len(block) for block in plan.layout.blocks]
    shares = balance(
        plan.layout.context_len - sum(lengths[:pinned]),
        _rank_loads(plan, costs, pinned),
        _unit_costs(costs),
    )
    for rank, share in enumerate(shares):
        free = [block for block in plan.layout.owned_by(rank) if block.index >= pinned]
        for block, length in zip(free, share, strict=True):
            lengths[block.index] = length
    return replace(plan, layout=plan.layout.with_lengths(lengths))


def balanced_behind_anchor(
    plan_of: Callable[[int], PrefillPlan], costs: CostModel, *, longest: int
) -> PrefillPlan:
    """The best balanced plan where block 0 is everyone's anchor, so that its length weighs on all.

    Args:
        plan_of: a plan for a length of block 0, from 1 to `longest`.
    """

    def outcome(first_len: int) -> tuple[int, int]:
        return slowest(balanced(plan_of(first_len), costs, pinned=1), costs), first_len

    low, high = 1, longest
    while True:
        # The slowest rank gets faster up to some length of block 0 and slower beyond it.
        step = max(1, (high - low) // _CANDIDATES)
        best = min(map(outcome, [*range(low, high, step), high]))[1]
        if step == 1:
            return balanced(plan_of(best), costs, pinned=1)
        low, high = max(low, best - step), min(high, best + step)


def slowest(plan: PrefillPlan, costs: CostModel) -> int:
    """Predicted cost of the slowest rank in one layer, in femtoseconds."""
    unit = _unit_costs(costs)
    return max(
        rank_cost(load, [len(block) for block in plan.layout.owned_by(rank)], unit)
        for rank, load in enumerate(_rank_loads(plan, costs, 0))
    )


def _unit_costs(costs: CostModel) -> UnitCosts:
    return UnitCosts(costs.row_cost, costs.pair_cost)


def _rank_loads(plan: PrefillPlan, costs: CostModel, pinned: int) -> list[RankLoad]:
    """Every rank's fixed cost (anchor, wire, pinned blocks) and its blocks of open length."""
    unit = _unit_costs(costs)
    loads = []
    for rank in range(plan.layout.world_size):
        anchor_len = plan.copied_anchor(rank)
        fixed = unit.row * anchor_len + unit.pair * causal_pairs(anchor_len)
        fixed += costs.token_wire_cost * plan.received_tokens(rank)
        owned = plan.layout.owned_by(rank)
        for block in owned:
            if block.index < pinned:
                pairs = causal_pairs(len(block), plan.upstream_len(block.index))
                fixed += unit.row * len(block) + unit.pair * pairs
        free = (block for block in owned if block.index >= pinned)
        loads.append(
            RankLoad(
                fixed,
                tuple(
                    BlockLoad(
                        plan.upstream_len(block.index),
                        max(1, plan.excluded(block) + plan.passing_lens[block.index]),
                    )
                    for block in free
                ),
            )
        )
    return loads
