"""Guarantees of compressors' scores: they are what the descriptions say, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apb.attention.selection import max_pool
from apb.compress.base import BlockView, Compressor
from blocks import GROUPS, HEAD_DIM, NUM_KV_HEADS, TARGET, build, draw_block


def pooled_scores(compressor: Compressor, block: BlockView) -> Tensor:
    return max_pool(compressor.score(block), compressor.pool)


def pooled(scores: list[float], kernel: int) -> list[float]:
    reach = kernel // 2
    return [max(scores[max(0, i - reach) : i + reach + 1]) for i in range(len(scores))]


def query_scores(block: BlockView, head: int, rows_HWD: Tensor, kernel: int) -> list[float]:
    """Mean of q.k over the rows and the heads of the group."""
    scores = []
    for key_D in block.k_KSD[head]:
        products = [
            float(row_D @ key_D)
            for q_head in range(head * GROUPS, (head + 1) * GROUPS)
            for row_D in rows_HWD[q_head]
        ]
        scores.append(sum(products) / len(products))
    return pooled(scores, kernel)


def window_scores(block: BlockView, head: int, window: int, kernel: int) -> list[float]:
    """Mean attention that a token gets from the last rows, each of which sees no later token."""
    num_tokens = block.k_KSD.shape[1]
    rows = range(max(0, num_tokens - window), num_tokens)
    scores = [0.0] * num_tokens
    for q_head in range(head * GROUPS, (head + 1) * GROUPS):
        for row in rows:
            keys = block.k_KSD[head, : row + 1]
            weights = [math.exp(float(block.q_HSD[q_head, row] @ k) * block.scale) for k in keys]
            for token, weight in enumerate(weights):
                scores[token] += weight / sum(weights) / (len(rows) * GROUPS)
    return pooled(scores, kernel)


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


def cosine(a_D: Tensor, b_D: Tensor) -> float:
    return float(a_D @ b_D / (a_D.norm() * b_D.norm()))


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_keydiff_score_falls_with_the_cosine_to_the_mean_direction(num_tokens: int) -> None:
    block = draw_block(num_tokens)
    expected = []
    for keys_SD in block.k_KSD:
        mean_D = torch.stack([key_D / key_D.norm() for key_D in keys_SD]).mean(dim=0)
        expected.append([-cosine(key_D, mean_D) for key_D in keys_SD])
    assert_scores(pooled_scores(build("keydiff"), block), expected)


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_tova_score_is_the_mean_attention_of_the_last_row_over_all_heads(num_tokens: int) -> None:
    block = draw_block(num_tokens)
    scores = [0.0] * num_tokens
    for q_head, q_SD in enumerate(block.q_HSD):
        keys_SD = block.k_KSD[q_head // GROUPS]
        weights = [math.exp(float(q_SD[-1] @ key_D) * block.scale) for key_D in keys_SD]
        for token, weight in enumerate(weights):
            scores[token] += weight / sum(weights) / (NUM_KV_HEADS * GROUPS)
    assert_scores(pooled_scores(build("tova"), block), [scores] * NUM_KV_HEADS)


def deviations(x_LD: list[Tensor], reference_LD: list[Tensor]) -> list[float]:
    """Softmax over the tokens of the deviation of their channels, scaled by the reference."""
    low_D, high_D = torch.stack(reference_LD).amin(0), torch.stack(reference_LD).amax(0)
    spreads = []
    for x_D in x_LD:
        scaled = ((x_D - low_D) / (high_D - low_D)).tolist()
        mean = sum(scaled) / HEAD_DIM
        spreads.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (HEAD_DIM - 1)))
    weights = [math.exp(spread - max(spreads)) for spread in spreads]
    return [weight / sum(weights) for weight in weights]


def lag_scores(keys_SD: Tensor, values_SD: Tensor, lag: int) -> list[float]:
    """Share of its own partition that each token beats."""
    starts = range(0, len(keys_SD), min(lag, len(keys_SD)))
    places = [range(start, min(start + lag, len(keys_SD))) for start in starts]
    whole = [place for place in places if len(place) == len(places[0])]
    scores = []
    for index, place in enumerate(places):
        reference = whole[index + 1] if index + 1 < len(whole) else whole[max(0, index - 1)]
        both = [
            deviations([x_SD[t] for t in place], [x_SD[t] for t in reference])
            for x_SD in (keys_SD, values_SD)
        ]
        total = [of_key + of_value for of_key, of_value in zip(*both, strict=True)]
        scores += [sum(other < mine for other in total) / len(place) for mine in total]
    return scores


@pytest.mark.parametrize("lag", [4, 5, 7, 64])
@pytest.mark.parametrize("num_tokens", [3, 5, 7, 12, 20, 23])
def test_lag_score_is_the_rank_among_neighbours_scaled_by_those_that_follow(
    num_tokens: int, lag: int
) -> None:
    block = draw_block(num_tokens)
    expected = [
        lag_scores(keys_SD, values_SD, lag)
        for keys_SD, values_SD in zip(block.k_KSD, block.v_KSD, strict=True)
    ]
    assert_scores(pooled_scores(build("lag_kv", lag=lag), block), expected)


def rotation(position: int) -> Tensor:
    """RoPE at a position as a matrix, scaling included."""
    inv_freq_F, scaling = TARGET.rotary
    half = HEAD_DIM // 2
    matrix_DD = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    for index, angle in enumerate((inv_freq_F.double() * position).tolist()):
        matrix_DD[index, index] = matrix_DD[index + half, index + half] = math.cos(angle)
        matrix_DD[index, index + half] = -math.sin(angle)
        matrix_DD[index + half, index] = math.sin(angle)
    return matrix_DD * scaling


def expected_attention(block: BlockView, head: int, *, future: int, sinks: int) -> list[float]:
    """Logarithm of a token's expected share of attention, times the norm of its value."""
    num_tokens = block.k_KSD.shape[1]
    last = block.start + num_tokens
    mean_rotation_DD = torch.stack([rotation(p) for p in range(last, last + future)]).mean(dim=0)
    shares_S = torch.zeros(num_tokens, dtype=torch.float64)
    for q_head in range(head * GROUPS, (head + 1) * GROUPS):
        rows = [row for row in range(num_tokens) if block.start + row >= sinks]
        before_TD = torch.stack(
            [
                rotation(block.start + row).inverse() @ block.q_HSD[q_head, row].double()
                for row in rows or range(num_tokens)
            ]
        )
        mean_D = mean_rotation_DD @ before_TD.mean(dim=0)
        covariance_DD = (
            mean_rotation_DD
            @ before_TD.T.cov(correction=0).reshape(HEAD_DIM, HEAD_DIM)
            @ mean_rotation_DD.T
        )
        keys_SD = block.k_KSD[head].double() * block.scale
        expectations = [math.exp(k_D @ mean_D + k_D @ covariance_DD @ k_D / 2) for k_D in keys_SD]
        shares_S += torch.tensor(expectations) / sum(expectations) / GROUPS
    return (shares_S * GROUPS * block.v_KSD[head].double().norm(dim=-1)).log().tolist()


@pytest.mark.parametrize(("start", "sinks"), [(70, 4), (2, 4), (0, 5), (0, 40)])
@pytest.mark.parametrize("num_tokens", [3, 20])
@pytest.mark.parametrize("future", [1, 9])
def test_expected_attention_is_that_of_normally_distributed_future_queries(
    start: int, sinks: int, num_tokens: int, future: int
) -> None:
    block = draw_block(num_tokens, start=start)
    expected = [
        expected_attention(block, head, future=future, sinks=sinks) for head in range(NUM_KV_HEADS)
    ]
    found_KS = pooled_scores(build("expected_attention", future=future, sinks=sinks), block)
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
    expected_KS = torch.zeros(NUM_KV_HEADS, num_tokens)
    for name, weight in zip(members, weights or [1.0] * 3, strict=True):
        for head, scores in enumerate(pooled_scores(build(name), block).tolist()):
            order = sorted(range(num_tokens), key=lambda token: (-scores[token], token))
            for rank, token in enumerate(order, start=1):
                expected_KS[head, token] += weight / (7.0 + rank)
    fusion = build("fusion", members=members, weights=weights, constant=7.0)
    assert_scores(pooled_scores(fusion, block), expected_KS.tolist())
