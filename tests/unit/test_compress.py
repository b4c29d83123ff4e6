"""Guarantees of compressors: the budget and not a token of what is barred, reproducibly and per KV
head; and scores that are what each compressor's description says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from apb.attention.sdpa import SdpaBackend
from apb.attention.selection import max_pool, top_tokens
from apb.comm import Communicator
from apb.compress.base import BlockView, Compressor, CompressorConfig, CompressorTarget
from apb.compress.knorm import KnormCompressor, KnormConfig
from apb.compress.query import QueryConfig
from apb.compress.random import RandomConfig
from apb.compress.window import WindowConfig
from apb.config import compose_config
from apb.errors import InputError
from apb.methods.apb import ApbConfig
from apb.methods.auto import AutoConfig
from apb.plugins import PLUGINS
from apb.runner import RequestRunner

NAMES = tuple(PLUGINS["method/compressor"])
NUM_KV_HEADS, GROUPS, HEAD_DIM = 3, 2, 8
QUERY_LEN = 4


def build(name: str, *, seed: int = 0) -> Compressor:
    compressor: Compressor = PLUGINS["method/compressor"][name]().build(seed=seed)
    return compressor


def draw_block(num_tokens: int, *, query_len: int = QUERY_LEN) -> BlockView:
    return BlockView(
        layer_idx=2,
        block_idx=1,
        start=70,
        q_HSD=torch.randn(NUM_KV_HEADS * GROUPS, num_tokens, HEAD_DIM),
        k_KSD=torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM),
        v_KSD=torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM),
        scale=0.4,
        query_HWD=torch.randn(NUM_KV_HEADS * GROUPS, query_len, HEAD_DIM) if query_len else None,
    )


def select(
    compressor: Compressor, block: BlockView, *, budget: int, excluded: int = 0
) -> tuple[Tensor, Tensor]:
    """Positions and KV ``[P, 2, K, D]`` of the kept tokens."""
    out_P2KD = torch.full((budget, 2, NUM_KV_HEADS, HEAD_DIM), math.nan)
    index_KP = compressor.select(block, out_P2KD, backend=SdpaBackend(), excluded=excluded)
    return index_KP, out_P2KD


def kept(compressor: Compressor, block: BlockView, *, budget: int, excluded: int = 0) -> Tensor:
    return select(compressor, block, budget=budget, excluded=excluded)[0]


def pooled_scores(compressor: Compressor, block: BlockView) -> Tensor:
    return max_pool(compressor.score(block), compressor.pool)


@pytest.mark.parametrize("query_len", [0, QUERY_LEN])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [1, 2, 37, 130])
def test_exactly_the_budget_is_kept_in_order_and_nothing_barred(
    name: str, num_tokens: int, query_len: int
) -> None:
    block = draw_block(num_tokens, query_len=query_len)
    for excluded in {0, num_tokens // 3, num_tokens}:
        available = num_tokens - excluded
        for budget in {0, 1, available // 2, available - 1, available} & {*range(available + 1)}:
            index_KP = kept(build(name), block, budget=budget, excluded=excluded)
            assert index_KP.shape == (NUM_KV_HEADS, budget)
            assert (index_KP.diff(dim=-1) > 0).all()
            assert ((index_KP >= excluded) & (index_KP < num_tokens)).all()


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_score_at_least_as_high_as_the_others(name: str) -> None:
    block = draw_block(41)
    scores_KS = pooled_scores(build(name), block)
    for scores_S, index_P in zip(
        scores_KS, kept(build(name), block, budget=9, excluded=6), strict=True
    ):
        others = set(range(6, 41)) - set(index_P.tolist())
        assert scores_S[index_P].min() >= scores_S[sorted(others)].max()


@pytest.mark.parametrize("name", NAMES)
def test_kept_kv_is_that_of_the_kept_tokens(name: str) -> None:
    block = draw_block(41)
    index_KP, out_P2KD = select(build(name), block, budget=9, excluded=6)
    for head, index_P in enumerate(index_KP):
        assert torch.equal(out_P2KD[:, 0, head], block.k_KSD[head, index_P])
        assert torch.equal(out_P2KD[:, 1, head], block.v_KSD[head, index_P])


@pytest.mark.parametrize("budget", [1, 3, 5, 8])
def test_of_equal_scores_the_earliest_are_kept(budget: int) -> None:
    scores_KS = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 3.0, 0.0], [-0.0, 0.0] * 4])
    order = [[1, 3, 6, 2, 4, 5, 0, 7], [*range(8)]]
    expected = torch.tensor([sorted(head[:budget]) for head in order])
    assert torch.equal(top_tokens(scores_KS, budget), expected)


@pytest.mark.parametrize("name", NAMES)
def test_more_than_the_block_can_give_is_a_fault(name: str) -> None:
    with pytest.raises(AssertionError):
        kept(build(name), draw_block(10), budget=8, excluded=3)


@pytest.mark.parametrize("name", NAMES)
def test_selection_is_the_same_every_time(name: str) -> None:
    block = draw_block(50)
    first = kept(build(name, seed=5), block, budget=20)
    torch.randn(17)  # other draws in between do not matter
    assert torch.equal(kept(build(name, seed=5), block, budget=20), first)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
def test_permuted_kv_heads_keep_the_same_tokens_permuted(name: str) -> None:
    block = draw_block(50)
    order = torch.tensor([2, 0, 1])

    def permuted(x_HSD: Tensor) -> Tensor:
        permuted_HSD: Tensor = x_HSD.unflatten(0, (NUM_KV_HEADS, -1))[order].flatten(0, 1)
        return permuted_HSD

    assert block.query_HWD is not None
    other = block._replace(
        q_HSD=permuted(block.q_HSD),
        k_KSD=block.k_KSD[order],
        v_KSD=block.v_KSD[order],
        query_HWD=permuted(block.query_HWD),
    )
    compressor = build(name)
    expected = kept(compressor, block, budget=12, excluded=3)[order]
    assert torch.equal(kept(compressor, other, budget=12, excluded=3), expected)


def test_random_selection_differs_by_seed_layer_block_and_head() -> None:
    block = draw_block(60)

    def kept_by(seed: int, view: BlockView) -> Tensor:
        return kept(RandomConfig().build(seed=seed), view, budget=20)

    base = kept_by(1, block)
    assert not torch.equal(base[0], base[1])
    for other in (
        kept_by(2, block),
        kept_by(1, block._replace(layer_idx=3)),
        kept_by(1, block._replace(block_idx=2)),
    ):
        assert not torch.equal(other, base)


class Refusing(KnormCompressor):
    """Fits no model."""

    def attach(self, target: CompressorTarget) -> None:
        raise InputError(f"does not fit {target.model} in {target.dtype}")


@dataclass(kw_only=True, slots=True)
class RefusingConfig(CompressorConfig):
    def build(self, *, seed: int) -> Refusing:
        return Refusing()


@pytest.mark.parametrize("method", [ApbConfig, AutoConfig])
def test_compressor_meets_the_model_before_its_weights_are_loaded(method: type[ApbConfig]) -> None:
    config = compose_config(["model=tiny", "dtype=bfloat16"])
    config.method = method(compressor=RefusingConfig())
    with pytest.raises(InputError, match=r"does not fit tiny in torch.bfloat16"):
        RequestRunner(config, Communicator(0, 1, torch.device("cpu")))


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
    assert_scores(pooled_scores(QueryConfig(kernel=kernel).build(seed=0), block), expected)


@pytest.mark.parametrize("window", [1, 6, 64])
def test_query_score_without_a_question_uses_the_last_rows(window: int) -> None:
    block = draw_block(20, query_len=0)
    rows_HWD = block.q_HSD[:, -window:]
    expected = [query_scores(block, h, rows_HWD, 5) for h in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(QueryConfig(window=window).build(seed=0), block), expected)


@pytest.mark.parametrize("window", [1, 6, 64])
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_window_score_is_the_pooled_mean_causal_attention_of_the_last_rows(
    num_tokens: int, window: int
) -> None:
    block = draw_block(num_tokens)
    expected = [window_scores(block, h, window, 5) for h in range(NUM_KV_HEADS)]
    assert_scores(pooled_scores(WindowConfig(window=window).build(seed=0), block), expected)


def test_knorm_score_falls_with_the_length_of_the_key() -> None:
    block = draw_block(20)
    expected = [
        [-math.sqrt(sum(float(x) ** 2 for x in key_D)) for key_D in keys_SD]
        for keys_SD in block.k_KSD
    ]
    assert_scores(pooled_scores(KnormConfig().build(seed=0), block), expected)


@pytest.mark.parametrize("name", NAMES)
def test_16_bit_blocks_are_scored_in_fp32(name: str) -> None:
    block = draw_block(30)
    fields = ("q_HSD", "k_KSD", "v_KSD", "query_HWD")
    narrow = block._replace(**{f: getattr(block, f).to(torch.bfloat16) for f in fields})
    wide = block._replace(**{f: getattr(narrow, f).float() for f in fields})
    found = build(name).score(narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, build(name).score(wide), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", [QueryConfig, WindowConfig])
@pytest.mark.parametrize("setting", [{"window": 0}, {"kernel": 0}, {"kernel": 4}, {"kernel": -1}])
def test_windows_and_kernels_that_make_no_sense_are_refused(
    config: type[QueryConfig | WindowConfig], setting: dict[str, int]
) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=rf"method.compressor.{name}={value} must be"):
        config(**setting)
