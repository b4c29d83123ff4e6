"""Guarantees of every method under every layout, form of the anchor and placement of the KV.

The ids E1 to E6 are those of design section 7. `SETTINGS` is the table that a new method joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apb.attention.reference import ReferenceConfig
from apb.compress.knorm import KnormConfig
from apb.compress.random import RandomConfig
from apb.compress.window import WindowConfig
from apb.cost import NOMINAL_CPU, Rates
from apb.layout import LayoutPolicy
from apb.methods.apb import ApbConfig
from apb.methods.auto import AutoConfig
from apb.methods.base import MethodConfig
from apb.methods.placement import Placement
from apb.methods.plan import AnchorForm, PrefillPlan
from apb.methods.star import StarConfig
from apb.plugins import PLUGINS
from models import NAMES, hf_keys_values, hf_logits, random_ids
from rank_pool import RankPool
from ranks.cases import WORLD_SIZES, in_order, logits, make_prompt, max_diff, outcomes
from ranks.oracle import Statement
from ranks.programs import Case, Outcome, run_rewound, run_splits
from ranks.settings import (
    PLACEMENTS,
    SETTINGS,
    Setting,
    apb,
    blocks_of,
    cases_of,
    drawn_case,
    one_case_each,
    statement_of,
)

LOGPROB_TOLERANCE = 1e-3
KV_TOLERANCE = 1e-4
SAME = 1e-4
"""Between logits (of size 5 or so) from sums taken in another order."""
ACROSS_RANKS = 1e-5
APPROXIMATE = [setting for setting in SETTINGS if not setting.exact]
EXACT_PAIR = ["zigzag", "ulysses"]

PoolOf = Callable[[int], RankPool]

over_ranks = pytest.mark.parametrize("world_size", WORLD_SIZES)
over_models = pytest.mark.parametrize("model", NAMES)


class Found(NamedTuple):
    """A case of a setting and what every rank has after it."""

    setting: Setting
    case: Case
    plan: PrefillPlan
    ranks: list[Outcome]


@cache
def found(pool: RankPool, model: str) -> list[Found]:
    pairs = [(s, case) for s in SETTINGS for case in cases_of(s, model, pool.world_size)]
    results = outcomes(pool, [case for _, case in pairs])
    return [
        Found(setting, case, case.plan(pool.world_size), ranks)
        for (setting, _), (case, ranks) in zip(pairs, results, strict=True)
    ]


@cache
def oracle_kv(model: str, context: tuple[int, ...]) -> Tensor:
    return hf_keys_values(model, context)


@cache
def dense_logits(statement: Statement) -> Tensor:
    return statement.logits()


def exact_logits(case: Case) -> Tensor:
    context = case.prompt.context_ids
    return hf_logits(case.model, context + case.new_ids)[len(context) :]


def approximate(pool: RankPool, model: str) -> Iterator[tuple[Case, Statement, Tensor]]:
    """Each drawn case with its statement and the logits that were found."""
    for setting, case, plan, (owner, *_) in found(pool, model):
        if not setting.exact:
            yield case, statement_of(case, plan), owner.logits_TV


def test_every_method_is_in_the_table() -> None:
    listed = {type(setting.make(Random(0), 1)) for setting in SETTINGS}
    assert listed | {AutoConfig} == set(PLUGINS["method"].values())


@over_ranks
@over_models
def test_shards_partition_the_context_at_true_positions(
    pool_of: PoolOf, model: str, world_size: int
) -> None:
    """E1. Nothing is approximated below the first layer's attention, which places each key."""
    for _, case, plan, ranks in found(pool_of(world_size), model):
        for rank, outcome in enumerate(ranks):
            owners = [rank] if case.placement is Placement.sharded else [*range(world_size)]
            owned = [block for owner in owners for block in plan.layout.owned_by(owner)]
            held = case.placement is Placement.sharded or rank == 0
            expected = [p for block in owned for p in range(block.start, block.stop)]
            assert outcome.positions_S.tolist() == (expected if held else []), case
        positions, kv_L2KSD = in_order(ranks)
        context = case.prompt.context_ids
        assert positions == list(range(len(context))), case
        assert max_diff(kv_L2KSD[0], oracle_kv(model, context)[0]) < KV_TOLERANCE, case


@over_ranks
@over_models
def test_exact_settings_equal_the_hugging_face_model(
    pool_of: PoolOf, model: str, world_size: int
) -> None:
    """E2, and E3 for `apb` that passes everything."""
    for setting, case, _, ranks in found(pool_of(world_size), model):
        if not setting.exact:
            continue
        _, kv_L2KSD = in_order(ranks)
        assert max_diff(kv_L2KSD, oracle_kv(model, case.prompt.context_ids)) < KV_TOLERANCE, case
        expected_TV = exact_logits(case).log_softmax(-1)
        for rank in ranks if case.placement is Placement.sharded else ranks[:1]:
            diff = max_diff(rank.logits_TV.log_softmax(-1), expected_TV)
            assert diff < LOGPROB_TOLERANCE, case


@over_ranks
@over_models
def test_approximate_settings_equal_their_dense_statement(
    pool_of: PoolOf, model: str, world_size: int
) -> None:
    """E4, for the block lengths that the plan chose."""
    for case, statement, found_TV in approximate(pool_of(world_size), model):
        assert max_diff(found_TV, dense_logits(statement)) < SAME, case


@over_models
def test_results_do_not_depend_on_the_number_of_ranks_for_given_blocks(
    pool_of: PoolOf, model: str
) -> None:
    """E4; the same draw runs on both placements, by the number of ranks."""
    one, *others = [list(approximate(pool_of(world_size), model)) for world_size in WORLD_SIZES]
    compared = 0
    for other in others:
        for (case, statement, this_TV), (_, as_one, one_TV) in zip(other, one, strict=True):
            if statement == as_one:
                compared += 1
                assert max_diff(this_TV, one_TV) < ACROSS_RANKS, case
    assert compared >= len(others) * len(one) // 3, "even blocks are the same on any ranks"


def test_draws_reach_every_rule(pool_of: PoolOf) -> None:
    """Shortened queries, anchors of every kind, lossy passing blocks and uneven blocks occur."""
    pool = pool_of(WORLD_SIZES[-1])
    drawn = [statement for model in NAMES for _, statement, _ in approximate(pool, model)]
    passing = [s for s in drawn if not s.star and s.has_anchor]
    assert any(0 < len(s.spliced) < len(s.query) for s in passing)
    assert any(s.spliced and s.spliced == s.query for s in passing)
    assert any(s.shown_len > 0 and not s.spliced for s in passing)
    assert any(0 < s.splice < s.shown_len and s.spliced for s in passing)
    for name in ("query", "window", "knorm"):
        for shared in (False, True):
            chosen = [s for s in passing if (s.compressor, s.shared) == (name, shared)]
            assert any(s.spliced and 0 < s.passing_len < s.block_lens[0] // 2 for s in chosen)
    for name in ("expected_attention", "keydiff", "tova", "lag_kv", "fusion"):
        chosen = [s for s in passing if s.compressor == name]
        assert any(0 < s.passing_len < s.block_lens[0] // 2 for s in chosen), name
    assert any(len(set(s.layer_passing_lens)) > 1 for s in passing)
    for star in (False, True):
        uneven = [s for s in drawn if s.star is star and s.block_lens != s.even_lens]
        assert any(max(s.block_lens) - max(s.even_lens) > 1 for s in uneven)


@pytest.mark.parametrize("setting", APPROXIMATE, ids=lambda setting: setting.name)
def test_approximate_settings_differ_from_the_exact_ones(setting: Setting, pool_of: PoolOf) -> None:
    """Otherwise the tests of this file compare settings that do nothing."""
    diffs = [
        max_diff(owner.logits_TV, exact_logits(case))
        for model in NAMES
        for this, case, _, (owner, *_) in found(pool_of(1), model)
        if this.name == setting.name
    ]
    assert len(diffs) == setting.draws * len(NAMES)
    assert max(diffs) > 0.1


@over_ranks
@pytest.mark.parametrize("policy", LayoutPolicy, ids=lambda policy: policy.name)
def test_shared_anchor_equals_replicated_ones(
    pool_of: PoolOf, policy: LayoutPolicy, world_size: int
) -> None:
    """E5, for the blocks of the shared form and compressors that are blind to the question."""
    blind = ((KnormConfig(), 0.5), (WindowConfig(window=5), 5), (RandomConfig(), 0.25))
    shared, replicated = AnchorForm.shared, AnchorForm.replicated
    methods: list[MethodConfig] = [
        *(
            apb(compressor, policy, shared, anchor_len=anchor_len, passing_len=0.3)
            for compressor, anchor_len in blind
        ),
        StarConfig(layout=policy, anchor=shared, min_block_len=1),
    ]
    cases = [
        Case(
            model="llama",
            method=method,
            prompt=make_prompt(95, prefix_len=prefix_len, query_len=query_len),
            new_ids=random_ids(4, seed=7),
            num_blocks=blocks_of(policy)(7, world_size),
        )
        for method in methods
        for prefix_len, query_len in ((0, 0), (3, 5), (40, 30))
    ]
    pool = pool_of(world_size)
    forms = logits(pool, cases), logits(pool, [replace(c, anchor_form=replicated) for c in cases])
    for case, a_TV, b_TV in zip(cases, *forms, strict=True):
        assert max_diff(a_TV, b_TV) < SAME, case


@over_ranks
def test_query_of_many_tokens_equals_them_in_any_split_on_any_placement(
    pool_of: PoolOf, world_size: int
) -> None:
    """E6."""
    splits = ((6,), (1,) * 6, (1, 3, 2))
    cases, pool = one_case_each(world_size), pool_of(world_size)
    sharded, moved = (
        pool.run(run_splits, [replace(case, placement=placement) for case in cases], splits)
        for placement in PLACEMENTS
    )
    for case, (whole_TV, *_), *results in zip(cases, sharded[0], *sharded, moved[0], strict=True):
        for this_TV in chain.from_iterable(results):
            assert max_diff(this_TV, whole_TV) < SAME, case


@over_ranks
def test_backends_agree(pool_of: PoolOf, world_size: int) -> None:
    cases, pool = one_case_each(world_size), pool_of(world_size)
    reference = [replace(case, backend=ReferenceConfig()) for case in cases]
    pairs = zip(cases, logits(pool, cases), logits(pool, reference), strict=True)
    for case, sdpa_TV, reference_TV in pairs:
        assert max_diff(sdpa_TV, reference_TV) < SAME, case


@over_ranks
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
def test_rewound_tokens_leave_no_trace(
    pool_of: PoolOf, placement: Placement, world_size: int
) -> None:
    case = replace(drawn_case(APPROXIMATE[0], "llama", world_size, 0), placement=placement)
    for first_TM, again_TM in pool_of(world_size).run(run_rewound, case):
        assert torch.equal(first_TM, again_TM)


@over_ranks
@pytest.mark.parametrize(
    ("rates", "choices"),
    [
        (replace(NOMINAL_CPU, attention_flops=1e3), ["apb"]),
        (replace(NOMINAL_CPU, attention_flops=1e15, latency_s=10.0), ["full"]),
        (replace(NOMINAL_CPU, attention_flops=1e15, link_bytes=1e15, latency_s=0.0), EXACT_PAIR),
    ],
    ids=["slow_attention", "slow_links", "slow_linear_maps"],
)
def test_auto_gives_what_the_method_it_names_gives(
    pool_of: PoolOf, rates: Rates, choices: list[str], world_size: int
) -> None:
    details: dict[str, Any] = {"compressor": WindowConfig(), "min_block_len": 1}
    auto = Case(
        model="llama",
        method=AutoConfig(**details),
        prompt=make_prompt(96, prefix_len=2, query_len=5),
        new_ids=random_ids(4, seed=7),
        num_blocks=2 * world_size,
        rates=rates,
    )
    name = auto.plan(world_size).method
    assert name in (choices if world_size > 1 or choices == ["apb"] else ["full"])
    named = replace(auto, method=PLUGINS["method"][name](), num_blocks=None)
    if name == "apb":
        named = replace(auto, method=ApbConfig(**details))
    (_, ours), (_, theirs) = outcomes(pool_of(world_size), [auto, named])
    for rank, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        assert all(map(torch.equal, mine, its)), rank
