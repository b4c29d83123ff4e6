"""Attention of a few new rows over a long shard: the shard is split so that all of the GPU reads.

Letters: T new rows, S keys of the shard, N keys of the tail, H query heads, K key/value heads,
G = H / K, D head dim; in kernels M packed rows of a tile (see `apb_kernels.segments`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apb_kernels.arguments import check_device, check_keys, check_queries, check_scale
from apb_kernels.inner import attend_keys, keys_of
from apb_kernels.merge import merge
from apb_kernels.segment_attention import LOG2_E, Partial, padded_head_dim, scratch
from apb_kernels.tiles import TileConfig, tile_config

MAX_ROWS = 64
_MIN_SPLIT_KEYS = 256
_PROGRAMS_PER_PROCESSOR = 2


class Tail(NamedTuple):
    """The new rows' own keys: up to 64, seen causally or by a tree's rule."""

    k_KND: Tensor
    v_KND: Tensor
    visible_TN: Tensor | None = None
    """Bool; None is causal, with as many keys as rows. Every row has to see a key."""


def decode_attention(
    q_HTD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    length: Tensor,
    *,
    scale: float,
    tail: Tail | None = None,
    config: TileConfig | None = None,
    num_splits: int | None = None,
) -> Partial:
    """Attention of T rows over the first `length` keys of a shard, all seen, and over the tail.

    The grid depends on shapes alone and `length` is read on the device, so that a launch can be
    captured in a CUDA graph while the cache grows.

    Args:
        q_HTD: 1 to 64 rows.
        k_KSD, v_KSD: the shard with its spare room.
        length: int32 with one element, at most S, on the device of `q_HTD`.
        scale: factor on the scores, above 0.
        tail: only on the rank that owns the new rows.
        config: tile sizes; None takes those of the GPU's table.
        num_splits: of the shard; None fills the GPU.

    Returns:
        Output in the dtype of `q_HTD`, and the lse: 0 and -inf in rows that saw no key.

    Raises:
        ValueError: a dtype, head size, stride, device or number of rows that is not supported.
    """
    _check(q_HTD, k_KSD, v_KSD, length, scale, tail)
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits={num_splits} is not supported; supported are 1 and more")
    num_heads, num_rows, head_dim = q_HTD.shape
    num_kv_heads, capacity, _ = k_KSD.shape
    group_size = num_heads // num_kv_heads
    config = config or tile_config("decode", q_HTD.dtype, head_dim, q_HTD.device)
    tile_rows = min(config.rows, max(16, triton.next_power_of_2(num_rows * group_size)))
    num_tiles = triton.cdiv(num_rows * group_size, tile_rows)
    if num_splits is None:
        num_splits = _num_splits(num_tiles * num_kv_heads, capacity, q_HTD.device)
    parts = num_splits + (tail is not None)
    packed_NTHE = torch.empty(
        (parts, num_rows, num_heads, head_dim + 1), dtype=torch.float32, device=q_HTD.device
    )
    tail_k, tail_v, visible = tail or Tail(k_KSD, v_KSD)
    if visible is not None:
        visible = visible.contiguous().view(torch.uint8)
    with torch.cuda.device_of(q_HTD), scratch(config.tma):
        decode_attention_kernel[num_tiles, parts, num_kv_heads](
            q_HTD, k_KSD, v_KSD, length, tail_k, tail_v, visible, packed_NTHE,
            *q_HTD.stride()[:2], *k_KSD.stride()[:2], *v_KSD.stride()[:2],
            *tail_k.stride()[:2], *tail_v.stride()[:2], *packed_NTHE.stride()[:3],
            num_rows, tail_k.shape[1] if tail else 0, num_splits, scale * LOG2_E,
            G=group_size, D=head_dim,
            BLOCK_M=tile_rows, BLOCK_N=config.keys, BLOCK_D=padded_head_dim(head_dim),
            BLOCK_TAIL=max(16, triton.next_power_of_2(tail_k.shape[1])) if tail else 16,
            TMA=config.tma,
            HAS_TAIL=tail is not None, HAS_TREE=visible is not None,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return merge(packed_NTHE, dtype=q_HTD.dtype)


def _num_splits(programs_per_split: int, capacity: int, device: torch.device) -> int:
    """As many as fill the GPU, of at least 256 keys each."""
    if device.type != "cuda":
        return min(4, max(1, capacity // 16))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    filling = _PROGRAMS_PER_PROCESSOR * processors // programs_per_split
    return max(1, min(filling, triton.cdiv(capacity, _MIN_SPLIT_KEYS)))


# A tree of another size must not compile another kernel in the middle of an answer.
@triton.jit(do_not_specialize=["num_rows", "tail_len", "num_splits"])
def decode_attention_kernel(
    p_q, p_k, p_v, p_length, p_tail_k, p_tail_v, p_visible, p_packed,
    stride_qh, stride_qt, stride_kh, stride_ks, stride_vh, stride_vs,
    stride_tkh, stride_tks, stride_tvh, stride_tvs, stride_pn, stride_pt, stride_ph,
    num_rows, tail_len, num_splits, scale_log2,
    G: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr, TMA: tl.constexpr,
    HAS_TAIL: tl.constexpr, HAS_TREE: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows over one split of the shard, or over the tail as the last split."""
    i_split = tl.program_id(1)
    i_kv = tl.program_id(2).to(tl.int64)
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_token = o_row // G
    o_head = i_kv * G + o_row % G
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_token < num_rows
    m_value = m_row[:, None] & (o_d < D)[None, :]

    # [M, D]
    p_rows = p_q + o_head * stride_qh + o_token.to(tl.int64) * stride_qt
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_value, other=0.0)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    is_tail = i_split == num_splits if HAS_TAIL else False
    if is_tail:
        # The whole tail is one step: a row that saw none of its keys so far would have no maximum.
        o_n = tl.arange(0, BLOCK_TAIL)
        m_key = o_n < tail_len
        if HAS_TREE:
            p_rule = p_visible + o_token[:, None] * tail_len + o_n[None, :]
            m_seen = tl.load(p_rule, mask=m_row[:, None] & m_key[None, :], other=1) != 0
        else:
            m_seen = o_n[None, :] <= o_token[:, None]
        p_tail_k += i_kv * stride_tkh
        p_tail_v += i_kv * stride_tvh
        b_k = load_tail(p_tail_k, stride_tks, tail_len, D, BLOCK_TAIL, BLOCK_D)
        b_s = tl.dot(b_q, b_k.T, input_precision="tf32x3") * scale_log2
        b_s = tl.where(m_seen & m_key[None, :], b_s, float("-inf"))
        b_max = tl.max(b_s, axis=1)
        b_p = tl.exp2(b_s - b_max[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_v = load_tail(p_tail_v, stride_tvs, tail_len, D, BLOCK_TAIL, BLOCK_D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="tf32x3")
    else:
        length = tl.load(p_length)
        share = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N
        first = i_split * share
        stop = tl.minimum(first + share, length)
        p_k += i_kv * stride_kh
        p_v += i_kv * stride_vh
        k_source = keys_of(p_k, stride_ks, length, D, BLOCK_N, BLOCK_D, TMA)
        v_source = keys_of(p_v, stride_vs, length, D, BLOCK_N, BLOCK_D, TMA)
        b_visible = tl.full([BLOCK_M], 0, tl.int32) + length
        unmasked = tl.maximum(first, first + (stop - first) // BLOCK_N * BLOCK_N)
        b_acc, b_max, b_sum = attend_keys(
            b_acc, b_max, b_sum, b_q, k_source, v_source, stride_ks, stride_vs,
            first, unmasked, b_visible, scale_log2, D, BLOCK_N, BLOCK_D, TMA, False,
        )  # fmt: skip
        b_acc, b_max, b_sum = attend_keys(
            b_acc, b_max, b_sum, b_q, k_source, v_source, stride_ks, stride_vs,
            unmasked, stop, b_visible, scale_log2, D, BLOCK_N, BLOCK_D, TMA, True,
        )  # fmt: skip

    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    p_rows = p_packed + i_split.to(tl.int64) * stride_pn + o_token * stride_pt + o_head * stride_ph
    tl.store(p_rows[:, None] + o_d[None, :], b_out, mask=m_value)
    tl.store(p_rows + D, b_lse, mask=m_row)


@triton.jit
def load_tail(p_kv, stride, stop, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tail's keys or values ``[N, D]``, 0 beyond it."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_kv + o_n.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_tile, mask=(o_n < stop)[:, None] & (o_d < D)[None, :], other=0.0)


def _check(
    q_HTD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    length: Tensor,
    scale: float,
    tail: Tail | None,
) -> None:
    check_queries("q_HTD", q_HTD)
    num_rows = q_HTD.shape[1]
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"q_HTD has {num_rows} rows; supported are 1 to {MAX_ROWS}")
    check_scale(scale)
    check_keys("k_KSD", k_KSD, q_HTD)
    check_keys("v_KSD", v_KSD, q_HTD)
    if v_KSD.shape != k_KSD.shape:
        raise ValueError(f"v_KSD has shape {tuple(v_KSD.shape)}, k_KSD {tuple(k_KSD.shape)}")
    check_device("length", length, q_HTD)
    if length.dtype != torch.int32 or length.numel() != 1:
        raise ValueError(
            f"length has dtype {length.dtype} and {length.numel()} elements; one int32 is wanted"
        )
    if tail is not None:
        _check_tail(tail, q_HTD, k_KSD)


def _check_tail(tail: Tail, q_HTD: Tensor, k_KSD: Tensor) -> None:
    check_keys("tail.k_KND", tail.k_KND, q_HTD)
    check_keys("tail.v_KND", tail.v_KND, q_HTD)
    num_rows, tail_len = q_HTD.shape[1], tail.k_KND.shape[1]
    if tail.k_KND.shape != tail.v_KND.shape or tail.k_KND.shape[0] != k_KSD.shape[0]:
        raise ValueError(
            f"tail.k_KND has shape {tuple(tail.k_KND.shape)} and tail.v_KND "
            f"{tuple(tail.v_KND.shape)}; equal ones of {k_KSD.shape[0]} heads are wanted"
        )
    if not 1 <= tail_len <= MAX_ROWS:
        raise ValueError(f"tail.k_KND has {tail_len} keys; supported are 1 to {MAX_ROWS}")
    if tail.visible_TN is None:
        if tail_len != num_rows:
            raise ValueError(f"a causal tail has as many keys as rows; {tail_len} and {num_rows}")
        return
    check_device("tail.visible_TN", tail.visible_TN, q_HTD)
    if tail.visible_TN.dtype != torch.bool or tail.visible_TN.shape != (num_rows, tail_len):
        raise ValueError(
            f"tail.visible_TN is {tail.visible_TN.dtype} of shape "
            f"{tuple(tail.visible_TN.shape)}; bool of {(num_rows, tail_len)} is wanted"
        )
