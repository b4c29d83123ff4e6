"""Guarantees of approximate methods: they compute what design section 4 says, on any ranks (E4)."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
from torch import Tensor

from apb.compress.base import CompressorConfig
from apb.compress.knorm import KnormConfig
from apb.compress.query import QueryConfig
from apb.compress.window import WindowConfig
from apb.layout import SequenceLayout
from apb.methods.apb import ApbConfig
from apb.methods.plan import AnchorForm
from apb.methods.star import StarConfig
from apb.prompts.base import PromptTokens
from models import NAMES, random_ids
from rank_pool import RankPool
from ranks.cases import WORLD_SIZES, logits, max_diff
from ranks.oracle import Statement
from ranks.programs import Case

TOLERANCE = 1e-4
ACROSS_RANKS = 1e-5
MAX_WORLD_SIZE = max(WORLD_SIZES)
DRAWS_PER_MODEL = 18

COMPRESSORS: dict[str, Callable[[int, int], CompressorConfig]] = {
    "query": lambda window, kernel: QueryConfig(window=window, kernel=kernel),
    "window": lambda window, kernel: WindowConfig(window=window, kernel=kernel),
    "knorm": lambda window, kernel: KnormConfig(),
}


def draw(model: str, seed: int) -> Statement:
    """Random settings with enough blocks for every world size."""
    rng = random.Random(f"{model} {seed}")
    num_blocks = rng.randint(MAX_WORLD_SIZE, 9)
    context_len = rng.randint(*rng.choice(((num_blocks, 40), (60, 220), (60, 220))))
    layout = SequenceLayout.even(context_len, num_blocks=num_blocks, world_size=1)
    block_lens = tuple(map(len, layout.blocks))
    context = random_ids(context_len, seed=seed)
    query = random_ids(rng.choice((0, 1, 3, 8, 8, 40)), seed=100 + seed)
    return Statement(
        model=model,
        context=context,
        prefix_len=rng.choice((0, 0, 1, 4, context_len - 1)),
        query=query,
        block_lens=block_lens,
        anchor_len=rng.randint(0, block_lens[0]),
        passing_len=rng.randint(0, layout.max_block_len) // rng.choice((1, 2, 4)),
        shared=seed // 3 % 2 == 0,
        compressor=("query", "window", "knorm")[seed % 3],
        window=rng.choice((1, 4, 64)),
        kernel=rng.choice((1, 3, 5)),
        new_ids=random_ids(rng.randint(1, 6), seed=200 + seed),
        star=seed % 9 == 8,
    )


def as_case(statement: Statement) -> Case:
    """The same settings as a user would give them."""
    form = AnchorForm.shared if statement.shared else AnchorForm.replicated
    star = StarConfig(anchor=form, min_block_len=1)
    apb = ApbConfig(
        compressor=COMPRESSORS[statement.compressor](statement.window, statement.kernel),
        anchor=form,
        anchor_len=statement.anchor_len,
        passing_len=statement.passing_len,
        min_block_len=1,
    )
    prefix_len = statement.prefix_len
    return Case(
        model=statement.model,
        method=star if statement.star else apb,
        prompt=PromptTokens(
            statement.context[:prefix_len], statement.context[prefix_len:], statement.query
        ),
        new_ids=statement.new_ids,
        num_blocks=len(statement.block_lens),
    )


@cache
def statements(model: str) -> tuple[Statement, ...]:
    return tuple(draw(model, seed) for seed in range(DRAWS_PER_MODEL))


@cache
def expected_logits(model: str) -> tuple[Tensor, ...]:
    return tuple(statement.logits() for statement in statements(model))


@cache
def found_logits(pool: RankPool, model: str) -> list[Tensor]:
    return logits(pool, [as_case(statement) for statement in statements(model)])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("model", NAMES)
def test_approximate_methods_equal_their_dense_statement(
    pool_of: Callable[[int], RankPool], model: str, world_size: int
) -> None:
    found = found_logits(pool_of(world_size), model)
    for statement, found_TV, expected_TV in zip(
        statements(model), found, expected_logits(model), strict=True
    ):
        assert max_diff(found_TV, expected_TV) < TOLERANCE, statement


@pytest.mark.parametrize("model", NAMES)
def test_results_do_not_depend_on_the_number_of_ranks(
    pool_of: Callable[[int], RankPool], model: str
) -> None:
    one, *others = [found_logits(pool_of(world_size), model) for world_size in WORLD_SIZES]
    for found in others:
        for statement, one_TV, found_TV in zip(statements(model), one, found, strict=True):
            assert max_diff(found_TV, one_TV) < ACROSS_RANKS, statement


def test_draws_reach_every_rule() -> None:
    """Shortened queries, anchors of every kind and lossy passing blocks occur among the draws."""
    drawn = [statement for model in NAMES for statement in statements(model) if not statement.star]
    assert any(0 < len(s.spliced) < len(s.query) for s in drawn)
    assert any(s.spliced and s.spliced == s.query for s in drawn)
    assert any(s.shown_len > 0 and not s.spliced for s in drawn)
    assert any(0 < s.splice < s.shown_len and s.spliced for s in drawn)
    for name in COMPRESSORS:
        for shared in (False, True):
            chosen = [s for s in drawn if (s.compressor, s.shared) == (name, shared)]
            assert any(s.spliced and 0 < s.passing_len < s.block_lens[0] // 2 for s in chosen)
