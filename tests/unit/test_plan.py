"""Guarantees of plans: what each row sees is no later token and no token twice, on any rank."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.compress.knorm import KnormConfig
from apb.errors import InputError
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig, Length
from apb.methods.full import FullConfig
from apb.methods.plan import AnchorForm, PrefillPlan
from apb.prompts.base import PromptTokens
from plan_strategies import PROMPTS, QUERY, SHARES, Planned, make_prompt, planned
from plans import make_plan


def plan_apb(
    prompt: PromptTokens,
    *,
    num_blocks: int | None = 4,
    world_size: int = 1,
    anchor_len: Length = 0.25,
    passing_len: Length = 0.125,
    form: AnchorForm = AnchorForm.shared,
    min_block_len: int = 1,
) -> PrefillPlan:
    config = ApbConfig(
        compressor=KnormConfig(),
        layout=LayoutPolicy.even,  # whose block length is what shares are of
        anchor=form,
        anchor_len=anchor_len,
        passing_len=passing_len,
        min_block_len=min_block_len,
    )
    return make_plan(config, prompt, world_size=world_size, num_blocks=num_blocks)


@given(drawn=planned(), rng=st.randoms(use_true_random=False))
def test_no_row_sees_a_later_token_or_a_token_twice(drawn: Planned, rng: random.Random) -> None:
    _, prompt, plan = drawn
    shown = plan.anchor.token_ids(prompt.context_ids, prompt.query_ids)
    passed: list[int] = []
    for block in plan.layout.blocks:
        # The first row of a block sees the least: what it may see, all rows may.
        upstream = [token for token in shown if token < QUERY] + passed if block.index else []
        assert len(set(upstream)) == len(upstream)
        assert all(token < block.start for token in upstream)
        length = plan.passing_lens[block.index]
        selectable = range(block.start + plan.excluded(block), block.stop)
        passed += rng.sample(selectable, length)
        assert (
            plan.upstream_len(block.index)
            == (len(shown) if block.index else 0) + len(passed) - length
        )
    assert plan.passing_lens[-1] == 0


@given(drawn=planned())
def test_block_0_may_not_pass_on_what_the_anchor_shows(
    drawn: Planned,
) -> None:
    _, prompt, plan = drawn
    first, *others = plan.layout.blocks
    anchor = plan.anchor.token_ids(prompt.context_ids, prompt.query_ids)
    shown = [token for token in anchor if token < QUERY]
    assert shown == list(prompt.context_ids[: plan.excluded(first)])
    assert plan.excluded(first) <= len(first)
    assert all(plan.excluded(block) == 0 for block in others)


@given(drawn=planned())
def test_ranks_run_their_blocks_at_their_true_positions(
    drawn: Planned,
) -> None:
    _, prompt, plan = drawn
    for rank in range(plan.layout.world_size):
        rows = plan.rows(rank, prompt.context_ids, prompt.query_ids)
        assert [block for block, _ in rows.blocks] == list(plan.layout.owned_by(rank))
        for block, where in rows.blocks:
            assert rows.positions[where] == tuple(range(block.start, block.stop))
            assert rows.token_ids[where] == prompt.context_ids[block.start : block.stop]
        local = [token for _, where in rows.blocks for token in rows.token_ids[where]]
        assert list(rows.token_ids[rows.local]) == local
        assert len(rows.token_ids) == len(rows.positions) == plan.num_rows(rank)


@given(drawn=planned())
def test_anchor_copies_run_where_they_are_read_or_once(
    drawn: Planned,
) -> None:
    _, prompt, plan = drawn
    expected = plan.anchor.token_ids(prompt.context_ids, prompt.query_ids)
    for rank in range(plan.layout.world_size):
        rows = plan.rows(rank, prompt.context_ids, prompt.query_ids)
        copy = list(rows.token_ids[rows.anchor])
        reads = any(block.index for block in plan.layout.owned_by(rank))
        runs = rank == 0 if plan.anchor_form is AnchorForm.shared else reads
        assert copy == (expected if runs else [])
        assert rows.positions[rows.anchor] == tuple(range(len(copy)))
        extra = len(rows.token_ids) - plan.layout.tokens_on(rank)
        # Without a query the anchor is the beginning of block 0, which need not run twice.
        is_block_0 = rank == 0 and plan.anchor.query_len == 0
        assert extra == (0 if is_block_0 else len(copy))


@given(prompt=PROMPTS, share=SHARES, num_blocks=st.integers(2, 12))
def test_query_is_spliced_in_after_the_prefix_and_fills_at_most_half_of_the_anchor(
    prompt: PromptTokens, share: float, num_blocks: int
) -> None:
    plan = plan_apb(prompt, num_blocks=num_blocks, anchor_len=share)
    if len(plan.layout.blocks) == 1:
        return
    length = int(share * plan.layout.max_block_len)
    spliced = min(len(prompt.query_ids), length // 2)
    shown = min(length - spliced, len(plan.layout.blocks[0]))
    before = min(len(prompt.prefix_ids), shown)
    query_end = list(prompt.query_ids)[len(prompt.query_ids) - spliced :]
    context = list(prompt.context_ids)
    expected = context[:before] + query_end + context[before:shown]
    assert plan.anchor.token_ids(prompt.context_ids, prompt.query_ids) == expected
    assert expected[plan.anchor.query_rows] == query_end
    shortened = bool(expected) and spliced < len(prompt.query_ids)
    assert any("query tokens" in note for note in plan.notes) is shortened


def test_token_counts_and_shares_of_the_block_mean_the_same() -> None:
    prompt = make_prompt(5, 395, 10)
    in_tokens = plan_apb(prompt, anchor_len=50, passing_len=20)
    assert in_tokens == plan_apb(prompt, anchor_len=0.5, passing_len=0.2)
    assert len(in_tokens.anchor) == 50
    assert in_tokens.passing_lens == (20, 20, 20, 0)


def test_shares_are_clamped_to_what_a_block_can_give() -> None:
    plan = plan_apb(make_prompt(0, 400, 0), anchor_len=0.75, passing_len=0.5)
    assert plan.passing_lens == (25, 50, 50, 0)
    assert plan_apb(make_prompt(0, 400, 0), anchor_len=1.0).passing_lens[0] == 0


def test_passing_length_in_tokens_is_clamped_where_only_block_0_is_too_short() -> None:
    plan = plan_apb(make_prompt(0, 400, 0), anchor_len=75, passing_len=100)
    assert plan.passing_lens == (25, 100, 100, 0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"anchor_len": 101}, "anchor_len=101 .* lower method.anchor_len to 100 "),
        ({"passing_len": 101}, "passing_len=101 exceeds the block length of 100"),
    ],
)
def test_token_counts_that_do_not_fit_are_refused_in_a_sentence(
    lengths: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        plan_apb(make_prompt(0, 400, 0), **lengths)
    assert "\n" not in str(refusal.value)


def test_longest_anchor_that_a_refusal_offers_is_accepted() -> None:
    prompt = make_prompt(0, 400, 30)
    with pytest.raises(InputError, match=r"lower method\.anchor_len to 130 "):
        plan_apb(prompt, anchor_len=131)
    assert len(plan_apb(prompt, anchor_len=130).anchor) == 130


@pytest.mark.parametrize("value", [-1, -0.1, 1.1])
@pytest.mark.parametrize("name", ["anchor_len", "passing_len"])
def test_lengths_out_of_range_are_refused(name: str, value: Length) -> None:
    lengths: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=rf"method\.{name}={value}"):
        ApbConfig(compressor=KnormConfig(), **lengths)


def test_short_context_uses_fewer_blocks_and_says_so() -> None:
    prompt = make_prompt(0, 700, 5)
    plan = plan_apb(prompt, num_blocks=None, world_size=8, min_block_len=256)
    assert len(plan.layout.blocks) == 2
    assert any("2 of 8 blocks" in note for note in plan.notes)
    enough = plan_apb(make_prompt(0, 2048, 5), num_blocks=None, world_size=8, min_block_len=256)
    assert len(enough.layout.blocks) == 8
    assert enough.notes == ()


def test_one_block_has_neither_anchor_nor_passing_block() -> None:
    plan = plan_apb(make_prompt(2, 50, 5), num_blocks=1)
    assert (len(plan.anchor), plan.passing_lens) == (0, (0,))


@given(drawn=planned())
def test_received_tokens_are_the_upstream_keys_that_other_ranks_make(drawn: Planned) -> None:
    _, _, plan = drawn
    anchor_owner = plan.layout.blocks[0].rank
    for rank in range(plan.layout.world_size):
        seen = {
            (source.index, source.rank, token)
            for block in plan.layout.owned_by(rank)
            for source in plan.layout.blocks[: block.index]
            for token in range(plan.passing_lens[source.index])
        }
        arriving = sum(source_rank != rank for _, source_rank, _ in seen)
        reads_anchor = any(block.index for block in plan.layout.owned_by(rank))
        if plan.anchor_form is AnchorForm.shared and reads_anchor and rank != anchor_owner:
            arriving += len(plan.anchor)
        assert plan.received_tokens(rank) == arriving


def test_full_is_one_block_on_rank_0_and_refuses_more() -> None:
    plan = make_plan(FullConfig(), make_prompt(2, 50, 5), world_size=3)
    assert [plan.num_rows(rank) for rank in range(3)] == [52, 0, 0]
    with pytest.raises(InputError, match="num_blocks=2"):
        make_plan(FullConfig(), make_prompt(2, 50, 5), world_size=3, num_blocks=2)
