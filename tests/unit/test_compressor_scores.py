"""Guarantees of compressors' scores: they are what the descriptions say, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apb.attention.selection import max_pool
from apb.compress.base import BlockView, Compressor
from blocks import HEAD_DIM, NUM_KV_HEADS, TARGET, build, draw_block
from score_statements import (
    expected_attention_scores,
    fused,
    keydiff_scores,
    lag_scores,
    query_scores,
    tova_scores,
    window_scores,
)


def pooled_scores(compressor: Compressor, block: BlockView) -> Tensor:
    return max_pool(compressor.score(block), compressor.pool)


def assert_scores(found_KS: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found_KS, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_query_score_is_the_pooled_mean_product_with_the_question(
    num_tokens: int, kernel: int
) -> None:
    block = draw_block(num_tokens)
    assert block.query_HWD is not None
    expected = [query_scores(block, h, block.query_HWD, kernel) for h in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(build("query", kernel=kernel), block), expected)


@pytest.mark.parametrize("window", [1, 6, 64])
def test_query_score_without_a_question_uses_the_last_rows(window: int) -> None:
    block = draw_block(20, query_len=0)
    rows_HWD = block.q_HSD[:, -window:]
    expected = [query_scores(block, h, rows_HWD, 5) for h in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(build("query", window=window), block), expected)


@pytest.mark.parametrize("window", [1, 6, 64])
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_window_score_is_the_pooled_mean_causal_attention_of_the_last_rows(
    num_tokens: int, window: int
) -> None:
    block = draw_block(num_tokens)
    expected = [window_scores(block, h, window, 5) for h in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(build("window", window=window), block), expected)


def test_knorm_score_falls_with_the_length_of_the_key() -> None:
    block = draw_block(20)
    expected = [
        [-math.sqrt(sum(float(x) ** 2 for x in key_D)) for key_D in keys_SD]
        for keys_SD in block.k_KSD
    ]
    assert_scores(pooled_scores(build("knorm"), block), expected)


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_keydiff_score_falls_with_the_cosine_to_the_mean_direction(num_tokens: int) -> None:
    block = draw_block(num_tokens)
    expected = [keydiff_scores(block, head) for head in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(build("keydiff"), block), expected)


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_tova_score_is_the_mean_attention_of_the_last_row_over_all_heads(num_tokens: int) -> None:
    block = draw_block(num_tokens)
    expected = [tova_scores(block, head) for head in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(build("tova"), block), expected)


@pytest.mark.parametrize("lag", [4, 5, 7, 64])
@pytest.mark.parametrize("num_tokens", [3, 5, 7, 12, 20, 23])
def test_lag_score_is_the_rank_among_neighbours_scaled_by_those_that_follow(
    num_tokens: int, lag: int
) -> None:
    block = draw_block(num_tokens)
    expected = [lag_scores(block, head, lag=lag) for head in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(build("lag_kv", lag=lag), block), expected)


@pytest.mark.parametrize(("start", "sinks"), [(70, 4), (2, 4), (0, 5), (0, 40)])
@pytest.mark.parametrize("num_tokens", [3, 20])
@pytest.mark.parametrize("future", [1, 9])
def test_expected_attention_is_that_of_normally_distributed_future_queries(
    start: int, sinks: int, num_tokens: int, future: int
) -> None:
    block = draw_block(num_tokens, start=start)
    expected = [
        expected_attention_scores(block, head, TARGET.rotary, future=future, sinks=sinks)
        for head in range(NUM_KV_HEADS)
    ]
    found_KS = pooled_scores(build("expected_attention", future=future, sinks=sinks), block)
    torch.testing.assert_close(found_KS, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("start", "rows"), [(0, 16), (0, 15), (70, 7), (9, 1)])
def test_expected_attention_asks_no_more_queries_than_it_may(start: int, rows: int) -> None:
    block = draw_block(20, start=start)
    expected = [
        expected_attention_scores(block, head, TARGET.rotary, future=9, sinks=4, rows=rows)
        for head in range(NUM_KV_HEADS)
    ]
    found_KS = pooled_scores(build("expected_attention", future=9, rows=rows), block)
    torch.testing.assert_close(found_KS, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_expected_attention_by_the_mean_alone_is_that_of_queries_all_the_same() -> None:
    block = draw_block(20)
    rotated = TARGET.rotary.at(torch.arange(70, 90)).rotate(torch.randn(6, 1, HEAD_DIM))
    same = block._replace(q_HSD=rotated)
    found, alone = (build("expected_attention", covariance=c).score(same) for c in (True, False))
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    by_mean = build("expected_attention", covariance=False).score(block)
    assert (build("expected_attention").score(block) - by_mean).abs().max() > 0.01


def test_expected_attention_does_not_depend_on_where_a_text_begins() -> None:
    block = draw_block(20)
    q_HSD, k_KSD = block.before_rope(TARGET.rotary)
    scores = []
    for start in (70, 1070):
        turned = TARGET.rotary.at(torch.arange(start, start + 20))
        moved = block._replace(start=start, q_HSD=turned.rotate(q_HSD), k_KSD=turned.rotate(k_KSD))
        scores.append(build("expected_attention").score(moved))
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("weights", [[], [2.0, 0.5, 1.0]])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_fusion_adds_reciprocal_ranks_of_pooled_scores(
    weights: list[float], num_tokens: int
) -> None:
    block, members = draw_block(num_tokens), ["query", "keydiff", "tova"]
    pooled = [pooled_scores(build(name), block).tolist() for name in members]
    expected = [
        fused([scores[head] for scores in pooled], weights or [1.0] * 3, 7.0)
        for head in range(NUM_KV_HEADS)
    ]
    fusion = build("fusion", members=members, weights=weights, constant=7.0)
    assert_scores(pooled_scores(fusion, block), expected)
