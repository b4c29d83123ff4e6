"""Guarantees of the selecting kernel: the very tokens of the specification, ties included (E10)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.attention import selection
from apb_kernels.select_topk import select_topk
from devices import at_home

SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -3e38, 3e38, 1e-45, math.inf, -math.inf])


@at_home
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    pool=st.sampled_from([1, 3, 5]),
    excluded=st.integers(0, 8),
    share=st.floats(0, 1),
)
def test_the_same_tokens_as_the_specification_and_their_kv(
    device: str, rows: list[list[float]], pool: int, excluded: int, share: float
) -> None:
    scores_KS = torch.tensor(rows)
    num_heads, num_tokens = scores_KS.shape
    excluded = min(excluded, num_tokens)
    budget = round(share * (num_tokens - excluded))
    k_KSD, v_KSD = torch.randn(2, num_heads, num_tokens, 8)
    expected_P2KD = torch.full((budget, 2, num_heads, 8), math.nan)
    expected = selection.select_topk(
        scores_KS, k_KSD, v_KSD, expected_P2KD, pool=pool, excluded=excluded
    )
    message = torch.full((budget + 2, 2, num_heads, 8), math.nan, device=device)
    found = select_topk(
        scores_KS.to(device).mT.contiguous().mT,  # strides are the caller's
        k_KSD.to(device),
        v_KSD.to(device),
        message[1:-1],
        pool=pool,
        excluded=excluded,
    )
    assert torch.equal(found.cpu().long(), expected)
    assert torch.equal(message[1:-1].cpu(), expected_P2KD)
    assert message[[0, -1]].isnan().all()


@at_home
@pytest.mark.parametrize("budget", [1, 700, 2500])
def test_more_tokens_than_a_tile(budget: int, device: str) -> None:
    """Many scores are equal."""
    scores_KS = torch.randint(0, 50, (2, 2600)).float()
    k_KSD, v_KSD = torch.randn(2, 2, 2600, 16).bfloat16()
    expected_P2KD, found_P2KD = torch.zeros(2, budget, 2, 2, 16)
    scores_there, k_there, v_there = (x.to(device) for x in (scores_KS, k_KSD, v_KSD))
    found_P2KD = found_P2KD.to(device)
    expected = selection.select_topk(scores_KS, k_KSD, v_KSD, expected_P2KD, pool=5, excluded=40)
    found = select_topk(scores_there, k_there, v_there, found_P2KD, pool=5, excluded=40)
    assert torch.equal(found.cpu().long(), expected)
    assert torch.equal(found_P2KD.cpu(), expected_P2KD)


@at_home
def test_scores_that_are_not_numbers_are_kept_first(device: str) -> None:
    scores_KS = torch.tensor([[1.0, math.inf, math.nan, 0.0, -math.nan, 2.0]], device=device)
    k_KSD, v_KSD = torch.randn(2, 1, 6, 8, device=device)
    found = select_topk(scores_KS, k_KSD, v_KSD, torch.empty(3, 2, 1, 8, device=device))
    assert found.tolist() == [[1, 2, 4]]


SCORES_KS, KV, OUT = torch.zeros(2, 9), torch.zeros(2, 9, 8), torch.zeros(4, 2, 2, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores_KS": SCORES_KS.half()}, "scores_KS is torch.float16"),
        ({"k_KSD": KV[:, :8]}, r"k_KSD has shape \(2, 8, 8\), scores \(2, 9\)"),
        ({"v_KSD": KV[:, :, :4]}, r"v_KSD has shape \(2, 9, 4\)"),
        ({"out_P2KD": OUT[:, :, :1]}, r"out_P2KD has shape \(4, 2, 1, 8\)"),
        ({"pool": 4}, "pool=4 is not supported; supported are odd numbers"),
        ({"excluded": 6}, "4 tokens are to be kept of 9 without 6"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Tensor | int], words: str) -> None:
    arguments = {"scores_KS": SCORES_KS, "k_KSD": KV, "v_KSD": KV, "out_P2KD": OUT}
    with pytest.raises(ValueError, match=words):
        select_topk(**{**arguments, **changes})  # type: ignore[arg-type]
