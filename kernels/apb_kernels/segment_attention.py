"""One launch of attention: packed rows over any number of segments, with one softmax.

Letters: T rows of this pass, S keys, H query heads, K key/value heads, G = H / K, D head dim; in
kernels M packed rows of a tile, N keys of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime._allocation import _allocator

from apb_kernels.arguments import check_device, check_keys, check_queries, check_scale
from apb_kernels.inner import attend_keys, keys_of
from apb_kernels.segments import (
    SEGMENT_FIELDS,
    TILE_FIELDS,
    KeySegment,
    segment_table,
    sorted_segments,
    spans_of,
    tile_table,
    unseen_rows,
)
from apb_kernels.tiles import TileConfig, tile_config

_MAX_PACKED_ROWS = 2**31 - 1
LOG2_E = math.log2(math.e)
"""Kernels work in powers of 2: a factor on scores, beside `scale`."""


class Partial(NamedTuple):
    """Softmax-weighted values, and the natural log of the softmax's denominator in fp32."""

    out_THD: Tensor
    lse_TH: Tensor


def segment_attention(
    q_HTD: Tensor,
    segments: Sequence[KeySegment],
    *,
    scale: float,
    carry: Partial | None = None,
    config: TileConfig | None = None,
) -> Partial:
    """Attention of every row over the segments it sees and over what `carry` already covers.

    The modified FlashAttention of APB (section 3.4), with blocks side by side in one launch: keys
    and values stay where they are, and of a causal segment only tiles below the diagonal are read.

    Args:
        q_HTD: query head ``h`` uses key/value head ``h // G``.
        segments: row ranges are equal or disjoint; may be empty, as may each of them.
        scale: factor on the scores, above 0.
        carry: an earlier result for the same rows over other keys. It is continued in place.
        config: tile sizes; None takes those of the GPU's table.

    Returns:
        `carry`, or a new result in the dtype of `q_HTD`: 0 and -inf in rows that saw no key.

    Raises:
        ValueError: a dtype, head size, stride, device or number of rows that is not supported.
    """
    _check(q_HTD, segments, scale, carry)
    num_heads, num_rows, head_dim = q_HTD.shape
    kept = sorted_segments(segments)
    spans = spans_of(kept)
    if carry is None:
        carry, continued = _empty(q_HTD), False
        for start, stop in unseen_rows(spans, num_rows):
            carry.out_THD[start:stop] = 0.0
            carry.lse_TH[start:stop] = float("-inf")
    else:
        continued = True
    if not kept:
        return carry
    num_kv_heads = kept[0].k_KSD.shape[0]
    group_size = num_heads // num_kv_heads
    config = config or tile_config("segment", q_HTD.dtype, head_dim, q_HTD.device)
    tiles = tile_table(spans, group_size, config.rows, q_HTD.device)
    with torch.cuda.device_of(q_HTD), scratch(config.tma):
        segment_attention_fwd_kernel[tiles.shape[0], num_kv_heads](
            q_HTD,
            carry.out_THD,
            carry.lse_TH,
            tiles,
            segment_table(kept, q_HTD),
            *q_HTD.stride()[:2],
            *carry.out_THD.stride()[:2],
            *carry.lse_TH.stride(),
            scale * LOG2_E,
            G=group_size,
            D=head_dim,
            BLOCK_M=config.rows,
            BLOCK_N=config.keys,
            BLOCK_D=padded_head_dim(head_dim),
            TILE_FIELDS=TILE_FIELDS,
            SEGMENT_FIELDS=SEGMENT_FIELDS,
            ALIGNED=16 // q_HTD.element_size(),
            TMA=config.tma,
            CARRY=continued,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return carry


def padded_head_dim(head_dim: int) -> int:
    """A power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def segment_attention_fwd_kernel(
    p_q, p_out, p_lse, p_tiles, p_segments,
    stride_qh, stride_qt, stride_ot, stride_oh, stride_lt, stride_lh, scale_log2,
    G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE_FIELDS: tl.constexpr, SEGMENT_FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr, TMA: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows of one key/value head; the fields are those of `segments.Tile`."""
    p_tile = p_tiles + tl.program_id(0) * TILE_FIELDS
    first_token = tl.load(p_tile).to(tl.int64)
    num_tokens = tl.load(p_tile + 1)
    first_row = tl.load(p_tile + 2)
    first_segment = tl.load(p_tile + 3)
    last_segment = tl.load(p_tile + 4)
    i_kv = tl.program_id(1).to(tl.int64)

    o_row = first_row + tl.arange(0, BLOCK_M)
    o_token = o_row // G
    o_head = i_kv * G + o_row % G
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_token < num_tokens
    m_value = m_row[:, None] & (o_d < D)[None, :]
    i_token = first_token + o_token

    # [M, D]
    p_rows = p_q + o_head * stride_qh + i_token * stride_qt
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_value, other=0.0)
    p_rows = p_out + i_token * stride_ot + o_head * stride_oh
    p_out_tile = p_rows[:, None] + o_d[None, :]
    p_lse_tile = p_lse + i_token * stride_lt + o_head * stride_lh
    if CARRY:
        b_max = tl.load(p_lse_tile, mask=m_row, other=0.0) * 1.4426950408889634
        b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)
        b_acc = tl.load(p_out_tile, mask=m_value, other=0.0).to(tl.float32)
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for i_segment in range(first_segment, last_segment):
        p_segment = p_segments + i_segment * SEGMENT_FIELDS
        # The launcher has checked that rows start at multiples of 16 bytes.
        stride_kh = tl.multiple_of(tl.load(p_segment + 2), ALIGNED)
        stride_ks = tl.multiple_of(tl.load(p_segment + 3), ALIGNED)
        stride_vh = tl.multiple_of(tl.load(p_segment + 4), ALIGNED)
        stride_vs = tl.multiple_of(tl.load(p_segment + 5), ALIGNED)
        num_keys = tl.load(p_segment + 6).to(tl.int32)
        is_causal = tl.load(p_segment + 7) != 0
        p_k = p_q + tl.multiple_of(tl.load(p_segment), ALIGNED) + i_kv * stride_kh
        p_v = p_q + tl.multiple_of(tl.load(p_segment + 1), ALIGNED) + i_kv * stride_vh
        k_source = keys_of(p_k, stride_ks, num_keys, D, BLOCK_N, BLOCK_D, TMA)
        v_source = keys_of(p_v, stride_vs, num_keys, D, BLOCK_N, BLOCK_D, TMA)

        # Row i of a segment sees its first b_visible keys. Steps that every row of the tile sees
        # whole need no mask; those that no row sees are left out.
        b_visible = tl.where(is_causal, o_token + 1, num_keys)
        seen_by_all = tl.where(is_causal, first_row // G + 1, num_keys)
        seen_by_any = tl.where(is_causal, (first_row + BLOCK_M - 1) // G + 1, num_keys)
        seen_by_any = tl.minimum(seen_by_any, num_keys)
        unmasked = tl.minimum(seen_by_all, num_keys) // BLOCK_N * BLOCK_N
        b_acc, b_max, b_sum = attend_keys(
            b_acc, b_max, b_sum, b_q, k_source, v_source, stride_ks, stride_vs,
            0, unmasked, b_visible, scale_log2, D, BLOCK_N, BLOCK_D, TMA, False,
        )  # fmt: skip
        b_acc, b_max, b_sum = attend_keys(
            b_acc, b_max, b_sum, b_q, k_source, v_source, stride_ks, stride_vs,
            unmasked, seen_by_any, b_visible, scale_log2, D, BLOCK_N, BLOCK_D, TMA, True,
        )  # fmt: skip

    # A sum is 0 only where a row saw no key; there the result is 0 and -inf, not NaN.
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    tl.store(p_out_tile, b_out.to(p_out.dtype.element_ty), mask=m_value)
    tl.store(p_lse_tile, b_lse, mask=m_row)


@contextmanager
def scratch(needed: bool) -> Iterator[None]:
    """Lends memory for the tensor descriptors that a kernel makes, which Triton asks its user for.

    The user's own allocator is back afterwards.
    """
    if not needed:
        yield
        return
    lender = _allocator.get()
    triton.set_allocator(_lend)
    try:
        yield
    finally:
        triton.set_allocator(lender)


def _lend(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _empty(q_HTD: Tensor) -> Partial:
    num_heads, num_rows, head_dim = q_HTD.shape
    return Partial(
        torch.empty((num_rows, num_heads, head_dim), dtype=q_HTD.dtype, device=q_HTD.device),
        torch.empty((num_rows, num_heads), dtype=torch.float32, device=q_HTD.device),
    )


def _check(
    q_HTD: Tensor, segments: Sequence[KeySegment], scale: float, carry: Partial | None
) -> None:
    check_queries("q_HTD", q_HTD)
    check_scale(scale)
    if q_HTD.shape[0] * q_HTD.shape[1] > _MAX_PACKED_ROWS:
        raise ValueError(
            f"q_HTD has {q_HTD.shape[1]} rows of {q_HTD.shape[0]} heads; supported are "
            f"{_MAX_PACKED_ROWS} in all"
        )
    for i, segment in enumerate(segments):
        check_keys(f"segments[{i}].k_KSD", segment.k_KSD, q_HTD)
        check_keys(f"segments[{i}].v_KSD", segment.v_KSD, q_HTD)
        if segment.v_KSD.shape != segment.k_KSD.shape:
            raise ValueError(
                f"segments[{i}].v_KSD has shape {tuple(segment.v_KSD.shape)}, "
                f"not the keys' {tuple(segment.k_KSD.shape)}"
            )
        if segment.k_KSD.shape[0] != segments[0].k_KSD.shape[0]:
            raise ValueError(
                f"segments[{i}].k_KSD has {segment.k_KSD.shape[0]} heads, "
                f"segments[0].k_KSD {segments[0].k_KSD.shape[0]}"
            )
        if segment.causal and segment.k_KSD.shape[1] != segment.stop - segment.start:
            raise ValueError(
                f"segments[{i}] is causal with {segment.k_KSD.shape[1]} keys for "
                f"{segment.stop - segment.start} rows; as many are wanted"
            )
        if not 0 <= segment.start <= segment.stop <= q_HTD.shape[1]:
            raise ValueError(
                f"segments[{i}] has rows {segment.start} to {segment.stop} of {q_HTD.shape[1]}"
            )
    _check_rows(sorted_segments(segments))
    if carry is not None:
        _check_carry(carry, q_HTD)


def _check_rows(segments: Sequence[KeySegment]) -> None:
    for before, after in pairwise(segments):
        same = (before.start, before.stop) == (after.start, after.stop)
        if not same and after.start < before.stop:
            raise ValueError(
                f"segments have overlapping rows {before.start} to {before.stop} and "
                f"{after.start} to {after.stop}; supported are equal and disjoint ranges"
            )


def _check_carry(carry: Partial, q_HTD: Tensor) -> None:
    num_heads, num_rows, head_dim = q_HTD.shape
    for name, x, shape in (
        ("carry.out_THD", carry.out_THD, (num_rows, num_heads, head_dim)),
        ("carry.lse_TH", carry.lse_TH, (num_rows, num_heads)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; {shape} is wanted")
        check_device(name, x, q_HTD)
    if carry.lse_TH.dtype != torch.float32:
        raise ValueError(f"carry.lse_TH.dtype={carry.lse_TH.dtype} is not torch.float32")
    if carry.out_THD.stride(2) != 1 and head_dim > 1:
        raise ValueError(f"carry.out_THD.stride(2)={carry.out_THD.stride(2)}; 1 is wanted")
