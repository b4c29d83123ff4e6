"""Guarantees of compressors: the budget and not a token of what is barred, reproducibly and per KV
head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.attention.sdpa import SdpaBackend
from apb.attention.selection import max_pool, top_tokens
from apb.comm import Communicator
from apb.compress.base import BlockView, Compressor, CompressorConfig, CompressorTarget
from apb.compress.fusion import FusionConfig
from apb.compress.knorm import KnormCompressor
from apb.config import compose_config
from apb.errors import InputError
from apb.methods.apb import ApbConfig
from apb.methods.auto import AutoConfig
from apb.plugins import PLUGINS
from apb.runner import RequestRunner
from blocks import COMPRESSORS as NAMES
from blocks import HEAD_DIM, NUM_KV_HEADS, QUERY_LEN, build, changed, draw_block


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


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random", "retaining_head"}))
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
        return kept(build("random", seed=seed), view, budget=20)

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


@pytest.mark.parametrize("name", NAMES)
def test_16_bit_blocks_are_scored_in_fp32(name: str) -> None:
    block = draw_block(30)
    narrow = changed(block, lambda x_HSD: x_HSD.to(torch.bfloat16))
    wide = changed(narrow, Tensor.float)
    found = build(name).score(narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, build(name).score(wide), atol=1e-6, rtol=1e-6)


def within_more(x_HSD: Tensor) -> Tensor:
    """The same values as part of a longer sequence."""
    num_heads, num_tokens, head_dim = x_HSD.shape
    wide = torch.full((num_heads, num_tokens + 9, head_dim), math.nan)
    wide[:, 4:-5] = x_HSD
    return wide[:, 4:-5]


def token_by_token(x_HSD: Tensor) -> Tensor:
    """The same values with the heads of a token side by side."""
    return x_HSD.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_where_tensors_lie_in_memory(name: str) -> None:
    block = draw_block(300)
    expected_KS = build(name).score(block)
    for layout in (within_more, token_by_token):
        found_KS = build(name).score(changed(block, layout))
        torch.testing.assert_close(found_KS, expected_KS, atol=1e-5, rtol=1e-5)


def scaled(x_HSD: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (x_HSD * scale).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_any_block_are_finite(name: str, dtype: torch.dtype) -> None:
    """Also of tokens that are all the same, of no length or long."""
    block = draw_block(140)
    for scale in (0.0, 1.0, 100.0):
        long = changed(block, partial(scaled, scale=scale, dtype=dtype))
        same = changed(long, lambda x_HSD: x_HSD[:, :1].expand(-1, 140, -1))
        one = changed(long, lambda x_HSD: x_HSD[:, :1])
        for some in (long, same, one):
            assert build(name).score(some).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        *(
            (name, {setting: value}, f"{setting}={value} must be")
            for name in ("query", "window")
            for setting, value in (("window", 0), ("kernel", 0), ("kernel", 4), ("kernel", -1))
        ),
        ("expected_attention", {"future": 0}, "future=0 must be at least 1"),
        ("expected_attention", {"sinks": -1}, "sinks=-1 must not be negative"),
        ("expected_attention", {"rows": 0}, "rows=0 must be at least 1"),
        ("lag_kv", {"lag": 1}, "lag=1 must be at least 2"),
        ("fusion", {"members": ["window"]}, r"members=\[window\] must be two or more"),
        ("fusion", {"members": ["tova", "tova"]}, r"members=\[tova,tova\] must be .* each once"),
        ("fusion", {"members": ["tova", "fusion"]}, "members has 'fusion', which is none of query"),
        ("fusion", {"weights": [1.0]}, r"weights=\[1.0\] must be one for each of 2 members"),
        ("fusion", {"weights": [1.0, 0.0]}, r"weights=\[1.0,0.0\] must be above 0"),
        ("fusion", {"constant": -0.5}, "constant=-0.5 must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=rf"method\.compressor\.{words}"):
        PLUGINS["method/compressor"][name](**settings)


def test_members_of_a_fusion_are_named_in_a_list() -> None:
    overrides = ["method/compressor=fusion", "method.compressor.members=[keydiff,query]"]
    config = compose_config(["model=tiny", *overrides, "method.compressor.weights=[2,0.5]"])
    assert isinstance(config.method, ApbConfig)
    expected = FusionConfig(members=["keydiff", "query"], weights=[2.0, 0.5])
    assert config.method.compressor == expected
    assert build("fusion", members=["keydiff", "query"]).needs_query
    assert not build("fusion", members=["keydiff", "knorm"]).needs_query
