"""Plans whose block lengths make the slowest rank as fast as possible (design section 3)."""

from __future__ import annotations

from dataclasses import replace

from apb.balance import BlockLoad, RankLoad, UnitCosts, balance, causal_pairs, rank_cost
from apb.cost import CostModel
from apb.methods.plan import PrefillPlan
from apb.methods.wire import WireFormat


def balanced(plan: PrefillPlan, costs: CostModel, wire: WireFormat) -> PrefillPlan:
    """The plan with other block lengths on the same ranks; anchor and passing lengths stay.

    No block gets shorter than what it shows in the anchor and at most passes on, so every block
    sees as many upstream keys as before: lengths are balanced, not what is approximated.
    """
    shares = balance(plan.layout.context_len, _rank_loads(plan, costs, wire), _unit_costs(costs))
    lengths = [0] * len(plan.layout.blocks)
    for rank, share in enumerate(shares):
        for block, length in zip(plan.layout.owned_by(rank), share, strict=True):
            lengths[block.index] = length
    return replace(plan, layout=plan.layout.with_lengths(lengths))


def slowest(plan: PrefillPlan, costs: CostModel, wire: WireFormat = WireFormat.auto) -> int:
    """Predicted cost of the slowest rank in one layer, in femtoseconds."""
    unit = _unit_costs(costs)
    return max(
        rank_cost(load, [len(block) for block in plan.layout.owned_by(rank)], unit)
        for rank, load in enumerate(_rank_loads(plan, costs, wire))
    )


def _unit_costs(costs: CostModel) -> UnitCosts:
    return UnitCosts(costs.row_cost, costs.pair_cost)


def _rank_loads(plan: PrefillPlan, costs: CostModel, wire: WireFormat) -> list[RankLoad]:
    """Every rank's fixed cost (its copy of the anchor, what it receives) and its blocks."""
    unit = _unit_costs(costs)
    token_wire = costs.token_wire_cost(wire.element_bytes(costs.shape.head_dim))
    loads = []
    for rank in range(plan.layout.world_size):
        anchor_len = plan.copied_anchor(rank)
        blocks = tuple(
            BlockLoad(
                plan.upstream_len(block.index),
                max(1, plan.excluded(block) + plan.most_passed(block)),
            )
            for block in plan.layout.owned_by(rank)
        )
        loads.append(
            RankLoad(
                linear=unit.row * anchor_len,
                attention=unit.pair * causal_pairs(anchor_len),
                wire=token_wire * plan.received_tokens(rank),
                blocks=blocks,
            )
        )
    return loads
