"""Guarantees of balanced plans: no slower than even ones by prediction, and they show no less."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from apb.compress.knorm import KnormConfig
from apb.cost import NOMINAL_CPU, CostModel
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig
from apb.methods.balanced import balanced, slowest
from apb.methods.blocks import BlockConfig, BlockMethod
from apb.methods.plan import AnchorForm, PlanRequest, PrefillPlan
from apb.methods.star import StarConfig
from apb.methods.wire import WireFormat
from apb.prompts.base import PromptTokens
from plans import LLAMA_8B, SHAPE, make_plan

COSTS = CostModel(shape=SHAPE, rates=NOMINAL_CPU, itemsize=4)
FREE_ATTENTION = replace(NOMINAL_CPU, attention_flops=1e30, link_bytes=1e30)


class Pair(NamedTuple):
    """The same request's plans under two layout policies."""

    method: BlockMethod
    even: PrefillPlan
    balanced: PrefillPlan


def plan_both(config: BlockConfig, request: PlanRequest) -> Pair:
    even, method = (
        replace(config, layout=policy).build(seed=0)
        for policy in (LayoutPolicy.even, LayoutPolicy.balanced)
    )
    assert isinstance(method, BlockMethod)
    return Pair(method, even.plan(request), method.plan(request))


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Plans of `apb` or `star` for any prompt."""
    world_size = draw(st.integers(1, 6))
    form = draw(st.sampled_from(AnchorForm))
    star = StarConfig(anchor=form, min_block_len=1)
    apb = ApbConfig(
        compressor=KnormConfig(),
        anchor=form,
        anchor_len=draw(st.floats(0.0, 1.0)),
        passing_len=draw(st.floats(0.0, 1.0)),
        min_block_len=1,
    )
    context_len = draw(st.integers(1, 400))
    request = PlanRequest(
        context_len=context_len,
        world_size=world_size,
        costs=COSTS,
        prefix_len=draw(st.integers(0, context_len)),
        query_len=draw(st.integers(0, 60)),
        num_blocks=draw(st.none() | st.integers(world_size, 16)),
    )
    return plan_both(star if draw(st.booleans()) else apb, request)


@settings(deadline=None)
@given(pair=pairs())
def test_slowest_rank_is_predicted_no_slower_than_with_even_blocks(pair: Pair) -> None:
    assert slowest(pair.balanced, COSTS) <= slowest(pair.even, COSTS)


@settings(deadline=None)
@given(pair=pairs(), format=st.sampled_from([*WireFormat]))
def test_no_format_of_the_wire_makes_balanced_blocks_slower(pair: Pair, format: WireFormat) -> None:
    slow = replace(COSTS, rates=replace(COSTS.rates, link_bytes=1e6))
    plan = balanced(pair.even, slow, format)
    assert slowest(plan, slow, format) <= slowest(pair.even, slow, format)


@settings(deadline=None)
@given(pair=pairs())
def test_prediction_is_that_of_the_workload(pair: Pair) -> None:
    for plan in (pair.even, pair.balanced):
        works = [pair.method.workload(plan, SHAPE, rank) for rank in range(plan.layout.world_size)]
        assert slowest(plan, COSTS) == max(
            work.rows * COSTS.row_cost
            + max(
                work.head_pairs // SHAPE.num_heads * COSTS.pair_cost,
                work.received // SHAPE.kv_elements * COSTS.token_wire_cost(),
            )
            for work in works
        )


@settings(deadline=None)
@given(pair=pairs())
def test_only_lengths_change_and_every_block_keeps_what_it_shows_and_passes_on(pair: Pair) -> None:
    _, even, plan = pair
    assert (plan.anchor, plan.anchor_form, plan.passing_lens, plan.notes) == (
        *(even.anchor, even.anchor_form, even.passing_lens, even.notes),
    )
    assert [block.rank for block in plan.layout.blocks] == [b.rank for b in even.layout.blocks]
    assert plan.layout.context_len == even.layout.context_len
    for block, before in zip(plan.layout.blocks, even.layout.blocks, strict=True):
        assert plan.upstream_len(block.index) == even.upstream_len(block.index)
        assert plan.excluded(block) == even.excluded(before)
        assert len(block) >= plan.excluded(block) + plan.passing_lens[block.index]


def long_prompt(query_len: int) -> PlanRequest:
    costs = CostModel(shape=LLAMA_8B, rates=NOMINAL_CPU, itemsize=2)
    return PlanRequest(context_len=131_072, world_size=8, costs=costs, query_len=query_len)


def apb_config(form: AnchorForm, anchor_len: float = 0.5) -> ApbConfig:
    return ApbConfig(
        compressor=KnormConfig(), anchor=form, anchor_len=anchor_len, passing_len=0.125
    )


def test_rank_that_runs_the_shared_anchor_gets_fewer_tokens_for_it() -> None:
    """Block 0 sees nothing upstream, so that without the anchor it is the longest."""
    _, even, plan = plan_both(apb_config(AnchorForm.shared, 0.75), long_prompt(50))
    tokens = [plan.layout.tokens_on(rank) for rank in range(8)]
    assert tokens[0] < tokens[1]
    assert tokens[0] < even.layout.tokens_on(0)
    assert tokens[1:] == sorted(tokens[1:], reverse=True)
    _, _, plan = plan_both(apb_config(AnchorForm.shared, 0.0), long_prompt(50))
    tokens = [plan.layout.tokens_on(rank) for rank in range(8)]
    assert tokens == sorted(tokens, reverse=True)


def test_rank_without_a_copy_of_the_anchor_gets_most_tokens() -> None:
    _, even, plan = plan_both(apb_config(AnchorForm.replicated), long_prompt(50))
    tokens = [plan.layout.tokens_on(rank) for rank in range(8)]
    assert tokens[0] > even.layout.tokens_on(0)
    assert tokens == sorted(tokens, reverse=True)


def test_balancing_a_long_document_is_worth_it() -> None:
    request = long_prompt(50)
    _, even, plan = plan_both(apb_config(AnchorForm.shared), request)
    assert slowest(plan, request.costs) < 0.9 * slowest(even, request.costs)


def test_anchor_of_star_stays_as_long_as_an_even_block() -> None:
    """A cheaper anchor would be one token."""
    request = long_prompt(0)
    _, even, plan = plan_both(StarConfig(), request)
    assert len(plan.anchor) == len(even.layout.blocks[0])
    assert len(plan.layout.blocks[0]) > len(plan.anchor)


def test_blocks_that_pass_on_everything_stay_even() -> None:
    """Longer ones would not pass on everything."""
    config = replace(apb_config(AnchorForm.shared), passing_len=1.0)
    _, even, plan = plan_both(config, long_prompt(0))
    assert plan == even


def test_plans_are_balanced_once() -> None:
    request = long_prompt(50)
    _, _, plan = plan_both(apb_config(AnchorForm.shared), request)
    assert balanced(plan, request.costs, WireFormat.auto) == plan


def test_balance_depends_on_the_rates() -> None:
    """Where attention is free, only rows count, and all ranks run as many."""
    config = replace(apb_config(AnchorForm.shared), layout=LayoutPolicy.balanced)
    prompt = PromptTokens((), tuple(range(4000)), (1, 2, 3))
    plan = make_plan(config, prompt, world_size=4, rates=FREE_ATTENTION)
    rows = [plan.num_rows(rank) for rank in range(4)]
    assert max(rows) - min(rows) <= 1
    nominal = make_plan(config, prompt, world_size=4)
    lengths = [len(block) for block in nominal.layout.blocks]
    assert all(a > b for a, b in pairwise(lengths[1:]))
