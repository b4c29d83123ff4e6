"""Guarantees of prefill and query phase where nothing is approximated.

The shards hold every context token once, at its position; exact settings equal Hugging Face's
`sdpa` model; forms of the anchor and splits of the query that should not matter do not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from apb.attention.reference import ReferenceConfig
from apb.compress.base import CompressorConfig
from apb.compress.knorm import KnormConfig
from apb.compress.query import QueryConfig
from apb.compress.random import RandomConfig
from apb.compress.window import WindowConfig
from apb.methods.apb import ApbConfig, Length
from apb.methods.base import MethodConfig
from apb.methods.full import FullConfig
from apb.methods.plan import AnchorForm
from apb.methods.star import StarConfig
from models import NAMES, hf_keys_values, hf_logits, random_ids
from rank_pool import RankPool
from ranks.cases import WORLD_SIZES, in_order, logits, make_prompt, max_diff, outcomes
from ranks.programs import Case, run_rewound

LOGPROB_TOLERANCE = 1e-3
KV_TOLERANCE = 1e-4
SAME = 1e-4
"""Between logits (of size 5 or so) from sums taken in another order."""

PoolOf = Callable[[int], RankPool]

FULL: list[tuple[MethodConfig, int, int | None]] = [
    (FullConfig(), context_len, None) for context_len in (1, 2, 3, 5, 17, 64, 101, 200)
]


def apb(
    compressor: CompressorConfig, form: AnchorForm, anchor_len: Length, passing_len: Length
) -> ApbConfig:
    return ApbConfig(
        compressor=compressor,
        anchor=form,
        anchor_len=anchor_len,
        passing_len=passing_len,
        min_block_len=1,
    )


LOSSLESS: list[tuple[MethodConfig, int, int | None]] = [
    (apb(compressor, form, anchor_len, 1.0), context_len, num_blocks)
    for compressor, form, anchor_len in (
        (QueryConfig(), AnchorForm.shared, 0.25),
        (KnormConfig(), AnchorForm.replicated, 0.5),
        (WindowConfig(), AnchorForm.shared, 1.0),
        (RandomConfig(), AnchorForm.replicated, 0.0),
    )
    for context_len, num_blocks in (
        *((1, None), (2, None), (3, None), (7, None), (97, 5), (131, 8), (200, 4)),
        *((6, 6), (103, 7), (5, 9)),
    )
]
"""`apb` that passes every token; without a query to splice in it is exact."""

LOSSY: list[tuple[MethodConfig, int, int | None]] = [
    (method, context_len, num_blocks)
    for method in (
        apb(QueryConfig(), AnchorForm.shared, 0.25, 0.125),
        apb(WindowConfig(), AnchorForm.replicated, 0.5, 0.25),
        StarConfig(min_block_len=1),
        StarConfig(min_block_len=1, anchor=AnchorForm.shared),
    )
    for context_len, num_blocks in ((1, None), (3, None), (50, None), (57, 5), (120, 8))
]


def case(
    method: MethodConfig, context_len: int, num_blocks: int | None, *, model: str = "llama"
) -> Case:
    return Case(
        model=model,
        method=method,
        prompt=make_prompt(context_len),
        new_ids=random_ids(1 + context_len % 9, seed=7),
        num_blocks=num_blocks,
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("settings", [FULL, LOSSLESS], ids=["full", "apb_passing_all"])
def test_exact_settings_equal_the_hugging_face_model(
    pool_of: PoolOf,
    settings: list[tuple[MethodConfig, int, int | None]],
    model: str,
    world_size: int,
) -> None:
    cases = [case(*setting, model=model) for setting in settings]
    for this, ranks in outcomes(pool_of(world_size), cases):
        context = this.prompt.context_ids
        positions, kv_L2KSD = in_order(ranks)
        assert positions == list(range(len(context))), this
        assert max_diff(kv_L2KSD, hf_keys_values(model, context)) < KV_TOLERANCE, this
        expected_TV = hf_logits(model, context + this.new_ids)[len(context) :]
        for rank in ranks:
            diff = max_diff(rank.logits_TV.log_softmax(-1), expected_TV.log_softmax(-1))
            assert diff < LOGPROB_TOLERANCE, this


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shards_partition_the_context_after_approximate_methods(
    pool_of: PoolOf, world_size: int
) -> None:
    cases = [
        replace(case(*setting), prompt=make_prompt(setting[1], prefix_len=1, query_len=6))
        for setting in LOSSY
    ]
    for this, ranks in outcomes(pool_of(world_size), cases):
        positions, kv_L2KSD = in_order(ranks)
        assert positions == list(range(len(this.prompt.context_ids))), this
        assert kv_L2KSD.isfinite().all()
        # Nothing is approximated below the first layer's attention.
        expected_2KSD = hf_keys_values("llama", this.prompt.context_ids)[0]
        assert max_diff(kv_L2KSD[0], expected_2KSD) < KV_TOLERANCE, this


def test_approximate_settings_differ_from_the_exact_ones(pool_of: PoolOf) -> None:
    """Otherwise the tests of this folder compare settings that do nothing."""
    for setting in LOSSY:
        this = case(*setting)
        if this.num_blocks is None:
            continue
        context = this.prompt.context_ids
        exact_TV = hf_logits("llama", context + this.new_ids)[len(context) :]
        (logits_TV,) = logits(pool_of(1), [this])
        assert max_diff(logits_TV, exact_TV) > 0.1, this


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "compressor",
    [KnormConfig(), WindowConfig(window=5), RandomConfig()],
    ids=lambda c: type(c).__name__,
)
def test_shared_anchor_equals_replicated_ones(
    pool_of: PoolOf, compressor: CompressorConfig, world_size: int
) -> None:
    def cases(form: AnchorForm) -> list[Case]:
        return [
            replace(
                case(apb(compressor, form, anchor_len, 0.3), context_len, num_blocks),
                prompt=make_prompt(context_len, prefix_len=prefix_len, query_len=query_len),
            )
            for context_len, num_blocks in ((90, 4), (101, 7))
            for anchor_len in (0.5, 9)
            for prefix_len, query_len in ((0, 0), (3, 5), (40, 30))
        ]

    pool = pool_of(world_size)
    shared = logits(pool, cases(AnchorForm.shared))
    replicated = logits(pool, cases(AnchorForm.replicated))
    for this, a_TV, b_TV in zip(cases(AnchorForm.shared), shared, replicated, strict=True):
        assert max_diff(a_TV, b_TV) < SAME, this


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("model", NAMES)
def test_query_of_many_tokens_equals_them_in_any_split(
    pool_of: PoolOf, model: str, world_size: int
) -> None:
    whole = replace(
        case(apb(QueryConfig(), AnchorForm.shared, 0.25, 0.2), 83, 4, model=model),
        prompt=make_prompt(83, prefix_len=4, query_len=12),
        new_ids=random_ids(12, seed=5),
    )
    splits = [(1,) * 12, (5, 7), (11, 1), (1, 2, 3, 6), (3, 1, 1, 1, 6)]
    parts = [replace(whole, splits=split) for split in splits]
    expected_TV, *found = logits(pool_of(world_size), [whole, *parts])
    for split, logits_TV in zip(splits, found, strict=True):
        assert max_diff(logits_TV, expected_TV) < SAME, split


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_backends_agree(pool_of: PoolOf, world_size: int) -> None:
    cases = [case(*setting) for setting in LOSSY]
    pool = pool_of(world_size)
    reference = [replace(this, backend=ReferenceConfig()) for this in cases]
    pairs = zip(cases, logits(pool, cases), logits(pool, reference), strict=True)
    for this, sdpa_TV, reference_TV in pairs:
        assert max_diff(sdpa_TV, reference_TV) < SAME, this


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rewound_tokens_leave_no_trace(pool_of: PoolOf, world_size: int) -> None:
    for first_TM, again_TM in pool_of(world_size).run(run_rewound, case(*LOSSY[0])):
        assert torch.equal(first_TM, again_TM)
