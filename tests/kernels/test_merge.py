"""Guarantees of the merging kernel: what `merge_partials` says, for every log-sum-exp (E9)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.attention.base import AttentionPartial, merge_partials
from apb_kernels.merge import merge
from devices import at_home


@at_home
@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 5),
    rows=st.integers(0, 7),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 16, 80]),
    peak=st.sampled_from([0.0, 80.0, 1e4, -1e4]),
    empty=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_merging_is_what_the_specification_says(
    device: str,
    count: int,
    rows: int,
    heads: int,
    head_dim: int,
    peak: float,
    empty: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed_NTHE = torch.randn(count, rows, heads, head_dim + 1, generator=generator)
    packed_NTHE[..., -1] = packed_NTHE[..., -1] * 5 + peak
    keyless_NTH = torch.rand(count, rows, heads, generator=generator) < empty
    packed_NTHE[keyless_NTH] = torch.tensor([0.0] * head_dim + [-math.inf])
    found = merge(packed_NTHE.to(device))
    exact = merge_partials(
        [AttentionPartial(x[..., :-1], x[..., -1]) for x in packed_NTHE.double()]
    )
    for x, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double().cpu(), truth, atol=2e-6, rtol=2e-6)


@at_home
def test_partials_without_keys_change_no_bit(device: str) -> None:
    some = torch.randn(3, 2, 17, device=device)
    none = torch.cat([torch.zeros(3, 2, 16), torch.full((3, 2, 1), -math.inf)], dim=-1).to(device)
    for parts in ([some], [none, some], [some, none], [none, some, none]):
        found = merge(torch.stack(parts))
        assert torch.equal(found.out_THD, some[..., :-1])
        assert torch.equal(found.lse_TH, some[..., -1])


@at_home
def test_result_takes_the_dtype_asked_for(device: str) -> None:
    packed_NTHE = torch.randn(3, 4, 2, 9, device=device)
    found = merge(packed_NTHE, dtype=torch.float16)
    assert torch.equal(found.out_THD, merge(packed_NTHE).out_THD.half())
    assert found.lse_TH.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 3, 4), torch.float32, r"packed_NTHE has shape \(2, 3, 4\)"),
        ((0, 3, 4, 5), torch.float32, r"packed_NTHE has shape \(0, 3, 4, 5\)"),
        ((2, 3, 4, 5), torch.float16, "packed_NTHE.dtype=torch.float16 is not torch.float32"),
    ],
)
def test_bad_arguments_are_named(shape: tuple[int, ...], dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge(torch.zeros(shape, dtype=dtype))
