"""Guarantees of attention over segments: backends compute what the specification does (E10), and
partial results merge to the whole for every log-sum-exp (E9).

A backend may be at most twice as far from fp64 as plain attention in the same dtype is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.attention.base import (
    AttentionBackend,
    AttentionPartial,
    AttentionTarget,
    Segment,
    masked_attention,
    merge_partials,
)
from apb.attention.flash import FlashBackend, returning_lse
from apb.attention.reference import ReferenceBackend, _visible
from apb.errors import InputError
from apb.plugins import PLUGINS
from flash_attn_stand_in import flash_attn_func

NUM_KV_HEADS = 2
EPS = {torch.float32: 5e-6, torch.bfloat16: 1e-3}
"""About ten units in the last place of an lse; less than one in bf16."""
CPU = torch.device("cpu")
BACKENDS: dict[str, AttentionBackend] = {
    name: config().build(AttentionTarget(CPU, torch.float32, 64))
    for name, config in PLUGINS["backend"].items()
    if name != "flash" and not (name == "fused" and torch.cuda.is_available())
} | {"flash": FlashBackend(returning_lse(flash_attn_func))}

Spans = Sequence[tuple[int, int, int | None]]
"""Segments as ``(start, stop, keys)``; without a number of keys it is causal."""

PACKED: dict[str, Spans] = {
    "one causal block": [(0, 33, None)],
    "one row": [(0, 1, 1)],
    "one key": [(0, 19, 1)],
    "rows over many keys": [(0, 7, 129)],
    "packed blocks": [(0, 5, None), (5, 36, None), (36, 37, None)],
    "block with upstream keys": [(0, 31, None), (0, 31, 17)],
    "rows that see nothing": [(3, 8, None), (3, 8, 5), (9, 20, 3)],
    "empty segments": [(0, 9, 0), (4, 4, 12), (0, 9, None)],
    "nothing at all": [],
}


LARGE = PACKED | {
    "more than a tile": [(0, 301, None), (0, 301, 277)],
    "blocks of more than a tile": [(0, 150, None), (150, 420, None), (150, 420, 141)],
    "a long shard": [(0, 9, 3001), (0, 9, None)],
}
"""For the tile sizes that are shipped."""


def draw_rows(num_rows: int, head_dim: int, groups: int, device: torch.device = CPU) -> Tensor:
    return 2 * torch.randn(NUM_KV_HEADS * groups, num_rows, head_dim, device=device)


def draw_segments(spans: Spans, head_dim: int, device: torch.device = CPU) -> list[Segment]:
    segments = []
    for start, stop, num_keys in spans:
        length = stop - start if num_keys is None else num_keys
        k_KSD, v_KSD = torch.randn(2, NUM_KV_HEADS, length, head_dim, device=device)
        segments.append(Segment(start, stop, k_KSD, v_KSD, causal=num_keys is None))
    return segments


def converted(segments: Sequence[Segment], dtype: torch.dtype) -> list[Segment]:
    return [replace(s, k_KSD=s.k_KSD.to(dtype), v_KSD=s.v_KSD.to(dtype)) for s in segments]


def plain(q_HTD: Tensor, segments: Sequence[Segment], scale: float) -> AttentionPartial:
    """Attention written down row by row, every step in the dtype of `q_HTD`."""
    num_heads, num_rows, _ = q_HTD.shape
    out_THD = torch.zeros_like(q_HTD).transpose(0, 1)
    lse_TH = q_HTD.new_full((num_rows, num_heads), -math.inf)
    groups = num_heads // NUM_KV_HEADS
    for row in range(num_rows):
        seen = [
            (s.k_KSD[:, :length], s.v_KSD[:, :length])
            for s in segments
            if s.start <= row < s.stop
            for length in [row - s.start + 1 if s.causal else s.k_KSD.shape[1]]
            if length
        ]
        if not seen:
            continue
        k_KSD, v_KSD = (torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))
        for head in range(num_heads):
            scores_S = k_KSD[head // groups] @ q_HTD[head, row] * scale
            out_THD[row, head] = scores_S.softmax(dim=-1) @ v_KSD[head // groups]
            lse_TH[row, head] = scores_S.logsumexp(dim=-1)
    return AttentionPartial(out_THD, lse_TH)


def assert_as_good_as_plain(
    backend: AttentionBackend,
    spans: Spans,
    *,
    dtype: torch.dtype,
    head_dim: int,
    groups: int,
    device: torch.device = CPU,
) -> None:
    num_rows = max((stop for _, stop, _ in spans), default=4) + 1
    q_HTD = draw_rows(num_rows, head_dim, groups, device).to(dtype)
    segments = converted(draw_segments(spans, head_dim, device), dtype)
    scale = head_dim**-0.5
    exact = ReferenceBackend().attend(
        q_HTD.double(), converted(segments, torch.float64), scale=scale
    )
    found = backend.attend(q_HTD, segments, scale=scale)
    assert found.out_THD.shape == (num_rows, NUM_KV_HEADS * groups, head_dim)
    for x, same_dtype, truth in zip(found, plain(q_HTD, segments, scale), exact, strict=True):
        assert torch.equal(x.isfinite(), truth.isfinite())
        allowed = 2 * max_error(same_dtype, truth) + EPS[dtype]
        assert max_error(x, truth) <= allowed
    assert (found.out_THD[exact.lse_TH == -math.inf] == 0).all()


def max_error(x: Tensor, truth: Tensor) -> float:
    """Over finite entries; both are -inf where a row sees nothing."""
    errors = (x.double() - truth)[truth.isfinite()].abs()
    return float(errors.max()) if errors.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("spans", PACKED.values(), ids=PACKED.keys())
def test_backends_are_as_exact_as_plain_attention(
    name: str, spans: Spans, dtype: torch.dtype
) -> None:
    assert_as_good_as_plain(BACKENDS[name], spans, dtype=dtype, head_dim=16, groups=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 3, 7])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_backends_hold_for_every_head_dim_and_group_size(
    name: str, head_dim: int, groups: int, dtype: torch.dtype
) -> None:
    spans = [(0, 21, None), (0, 21, 13)]
    assert_as_good_as_plain(BACKENDS[name], spans, dtype=dtype, head_dim=head_dim, groups=groups)


def test_flash_attention_3_of_before_it_could_be_asked_for_the_lse() -> None:
    def flash_attn_3_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        asked = flash_attn_func(
            q, k, v, softmax_scale=softmax_scale, causal=causal, return_attn_probs=True
        )
        return asked[:2]

    backend = FlashBackend(returning_lse(flash_attn_3_func))
    spans = PACKED["block with upstream keys"]
    assert_as_good_as_plain(backend, spans, dtype=torch.bfloat16, head_dim=64, groups=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PLUGINS["backend"])
@pytest.mark.parametrize("spans", LARGE.values(), ids=LARGE.keys())
def test_backends_are_as_exact_as_plain_attention_on_a_gpu(
    name: str, spans: Spans, head_dim: int, dtype: torch.dtype
) -> None:
    cuda = torch.device("cuda")
    try:
        backend = PLUGINS["backend"][name]().build(AttentionTarget(cuda, dtype, head_dim))
    except InputError as reason:
        pytest.skip(str(reason))
    assert_as_good_as_plain(backend, spans, dtype=dtype, head_dim=head_dim, groups=4, device=cuda)


@pytest.mark.parametrize("name", BACKENDS)
def test_carry_continues_an_earlier_result(name: str) -> None:
    backend = BACKENDS[name]
    q_HTD = draw_rows(24, 16, 2)
    spans = [(0, 10, None), (12, 24, None), (0, 10, 7), (12, 24, 9)]
    segments = draw_segments(spans, 16)
    carry = backend.attend(q_HTD, segments[:2], scale=0.25)
    before = AttentionPartial(*(x.clone() for x in carry))
    assert_close(backend.attend(q_HTD, [], scale=0.25, carry=carry), before)
    found = backend.attend(q_HTD, segments[2:], scale=0.25, carry=before)
    whole = ReferenceBackend().attend(q_HTD, segments, scale=0.25)
    assert_close(found, whole)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("upstream", [0, 40])
def test_rows_of_a_tree_see_what_their_mask_says(name: str, upstream: int) -> None:
    """As one dense computation under the mask, with a shard that all rows see or without."""
    visible_TT = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    q_HTD = draw_rows(4, 16, 2)
    (shard,) = draw_segments([(0, 4, upstream + 4)], 16)
    segment = replace(shard, visible_TE=visible_TT)
    visible_TS = torch.cat([torch.ones(4, upstream, dtype=torch.bool), visible_TT], dim=1)
    expected = masked_attention(q_HTD, segment.k_KSD, segment.v_KSD, visible_TS, 0.25)
    assert_close(BACKENDS[name].attend(q_HTD, [segment], scale=0.25), expected)
    # Another tree over as many keys: nothing that was kept of the first may be used for it.
    chain_TT = torch.ones(4, 4, dtype=torch.bool).tril()
    visible_TS = torch.cat([torch.ones(4, upstream, dtype=torch.bool), chain_TT], dim=1)
    expected = masked_attention(q_HTD, segment.k_KSD, segment.v_KSD, visible_TS, 0.25)
    segment = replace(shard, visible_TE=chain_TT)
    assert_close(BACKENDS[name].attend(q_HTD, [segment], scale=0.25), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_key_that_is_not_a_number_shows_in_the_rows_that_see_it(name: str) -> None:
    q_HTD = draw_rows(24, 16, 2)
    segments = draw_segments([(0, 10, 7), (10, 24, 9)], 16)
    segments[0].k_KSD[0, 3] = float("nan")
    found = BACKENDS[name].attend(q_HTD, segments, scale=0.25)
    assert found.out_THD[:10, 0].isnan().all()
    assert found.out_THD[10:].isfinite().all()


@given(
    start=st.integers(0, 6),
    length=st.integers(0, 6),
    num_keys=st.none() | st.integers(0, 6),
    num_rows=st.integers(0, 14),
)
def test_segment_is_seen_by_its_rows_under_its_rule(
    start: int, length: int, num_keys: int | None, num_rows: int
) -> None:
    causal = num_keys is None
    k_KSD = torch.zeros(1, length if num_keys is None else num_keys, 4)
    segment = Segment(start, start + length, k_KSD, k_KSD, causal=causal)
    visible_TS = _visible(segment, num_rows)
    assert visible_TS.shape == (num_rows, k_KSD.shape[1])
    for row in range(num_rows):
        for key in range(k_KSD.shape[1]):
            belongs = start <= row < start + length
            assert visible_TS[row, key] == (belongs and (not causal or start + key <= row))


def test_causal_segment_has_as_many_keys_as_rows() -> None:
    k_KSD = torch.zeros(1, 3, 4)
    with pytest.raises(AssertionError):
        Segment(0, 4, k_KSD, k_KSD, causal=True)


def assert_close(found: AttentionPartial, expected: AttentionPartial) -> None:
    assert not found.out_THD.isnan().any()
    torch.testing.assert_close(found.out_THD, expected.out_THD, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(found.lse_TH, expected.lse_TH, atol=2e-6, rtol=2e-6)


@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    peak=st.sampled_from([0.0, 80.0, 1e3, -1e3, 1e4, -1e4]),
    seed=st.integers(0, 2**31),
)
def test_merged_shards_equal_attention_over_all_keys(
    shards: list[int], peak: float, seed: int
) -> None:
    """Shards of 0, 1 and more keys, with log-sum-exps up to 1e4 and beyond what exp can take."""
    generator = torch.Generator().manual_seed(seed)
    scores_THS = peak + torch.randn(3, 2, sum(shards), generator=generator).double() * 5
    values_HSD = torch.randn(2, sum(shards), 4, generator=generator).double()
    partials = [
        AttentionPartial(
            torch.einsum("ths,hsd->thd", scores.softmax(-1), values),
            scores.logsumexp(-1),
        )
        for scores, values in zip(
            scores_THS.split(shards, dim=2), values_HSD.split(shards, dim=1), strict=True
        )
    ]
    found = merge_partials(partials)
    whole = torch.einsum("ths,hsd->thd", scores_THS.softmax(-1), values_HSD)
    torch.testing.assert_close(found.out_THD, whole, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.lse_TH, scores_THS.logsumexp(-1), atol=1e-9, rtol=1e-12)
    single = merge_partials([AttentionPartial(*(x.float() for x in p)) for p in partials])
    # One unit of fp32 at 1e4 is 1e-3, so shares of shards are known to that.
    torch.testing.assert_close(single.out_THD.double(), whole, atol=5e-3, rtol=0)


def test_rows_that_no_shard_sees_are_0_with_lse_of_minus_infinity() -> None:
    empty = AttentionPartial.empty(3, 2, 4, torch.zeros(()))
    merged = merge_partials([empty, empty])
    assert torch.equal(merged.out_THD, torch.zeros(3, 2, 4))
    assert torch.equal(merged.lse_TH, torch.full((3, 2), -math.inf))


@pytest.mark.parametrize("lse", [0.0, 1e4, -1e4])
def test_empty_shards_change_no_bit(lse: float) -> None:
    some = AttentionPartial(torch.randn(3, 2, 4), torch.full((3, 2), lse))
    empty = AttentionPartial.empty(3, 2, 4, torch.zeros(()))
    for partials in ([some], [empty, some], [some, empty], [empty, some, empty]):
        merged = merge_partials(partials)
        assert torch.equal(merged.out_THD, some.out_THD)
        assert torch.equal(merged.lse_TH, some.lse_TH)


def test_partials_are_summed_in_the_order_given() -> None:
    """In fp32 the order shows: 1 is lost beside 2^27 unless the large ones cancel first."""
    large, one, minus, zero = (
        AttentionPartial(torch.full((1, 1, 1), value), torch.zeros(1, 1))
        for value in (2.0**27, 1.0, -(2.0**27), 0.0)
    )
    assert merge_partials([large, one, minus, zero]).out_THD.item() == 0.0
    assert merge_partials([large, minus, one, zero]).out_THD.item() == 0.25


def test_16_bit_partials_merge_in_the_dtype_of_the_lse() -> None:
    partials = [
        AttentionPartial(torch.randn(3, 2, 4, dtype=torch.bfloat16), torch.randn(3, 2))
        for _ in range(3)
    ]
    wide = [AttentionPartial(p.out_THD.float(), p.lse_TH) for p in partials]
    assert torch.equal(merge_partials(partials).out_THD, merge_partials(wide).out_THD)
    assert merge_partials(partials).out_THD.dtype == torch.float32
