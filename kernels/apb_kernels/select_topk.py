"""The tokens that a block passes on: pooled scores, the best per head, gathered into the message.

Letters: S tokens of the block, P kept ones, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apb_kernels.arguments import check_device

_TILE_TOKENS = 1024
_TILE_KEPT = 32


def select_topk(
    scores_KS: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    out_P2KD: Tensor,
    *,
    pool: int = 1,
    excluded: int = 0,
) -> Tensor:
    """Keep, per head, the P tokens whose pooled scores are highest; write their KV to `out_P2KD`.

    Of equal scores the earliest win, so that the choice is the same on every device; NaN counts as
    the highest, as in `torch.sort`. Kept tokens stay in the order of the text.

    Args:
        scores_KS: fp32.
        out_P2KD: a part of the message; keys and values are converted to its dtype.
        pool: a token takes the best score among this many around it; odd.
        excluded: that many tokens at the beginning are not kept; their scores are pooled.

    Returns:
        Positions of the kept tokens, ascending: int32 ``[K, P]``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or fewer tokens than are to be kept.
    """
    _check(scores_KS, k_KSD, v_KSD, out_P2KD, pool, excluded)
    num_heads, num_tokens = scores_KS.shape
    budget, head_dim = out_P2KD.shape[0], out_P2KD.shape[3]
    rank_KS = torch.empty(scores_KS.shape, dtype=torch.int32, device=scores_KS.device)
    index_KP = torch.empty((num_heads, budget), dtype=torch.int32, device=scores_KS.device)
    if budget == 0:
        return index_KP
    with torch.cuda.device_of(scores_KS):
        rank_scores_kernel[triton.cdiv(num_tokens, _TILE_TOKENS), num_heads](
            scores_KS, rank_KS, num_tokens, *scores_KS.stride(), rank_KS.stride(0),
            POOL=pool, BLOCK_S=_TILE_TOKENS,
        )  # fmt: skip
        choose_tokens_kernel[(num_heads,)](
            rank_KS, index_KP, num_tokens, excluded, budget, rank_KS.stride(0),
            BLOCK_S=_TILE_TOKENS,
        )  # fmt: skip
        gather_kv_kernel[triton.cdiv(budget, _TILE_KEPT), num_heads](
            index_KP, k_KSD, v_KSD, out_P2KD, budget,
            *k_KSD.stride(), *v_KSD.stride(), *out_P2KD.stride(),
            D=head_dim, BLOCK_P=_TILE_KEPT, BLOCK_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
    return index_KP


@triton.jit(do_not_specialize=["num_tokens"])
def rank_scores_kernel(
    p_scores, p_rank, num_tokens, stride_k, stride_s, stride_rank,
    POOL: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Pooled scores as integers of the same order."""
    i_kv = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    b_score = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for i_offset in range(POOL):
        o_near = o_s + i_offset - POOL // 2
        p_near = p_scores + i_kv * stride_k + o_near.to(tl.int64) * stride_s
        m_near = (o_near >= 0) & (o_near < num_tokens)
        b_near = tl.load(p_near, mask=m_near, other=float("-inf"))
        b_score = tl.maximum(b_score, b_near, propagate_nan=tl.PropagateNan.ALL)
    # Adding 0 makes one zero of two. Bits of negative numbers rise as the numbers fall.
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    b_rank = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_rank = tl.where(b_score != b_score, 0x7FFFFFFF, b_rank)
    tl.store(p_rank + i_kv * stride_rank + o_s, b_rank, mask=o_s < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "excluded", "budget"])
def choose_tokens_kernel(
    p_rank, p_index, num_tokens, excluded, budget, stride_rank, BLOCK_S: tl.constexpr
):
    """One head: the rank of the last kept token by bisection, then the kept tokens in order."""
    i_kv = tl.program_id(0).to(tl.int64)
    p_rank += i_kv * stride_rank
    p_index += i_kv * budget
    # At least `budget` tokens rank `least` or higher, and fewer rank `above` or higher.
    least = tl.full([], -(2**31), tl.int64)
    above = tl.full([], 2**31, tl.int64)
    for _ in range(32):
        middle = (least + above) >> 1
        enough = count_from(p_rank, excluded, num_tokens, middle, BLOCK_S) >= budget
        least = tl.where(enough, middle, least)
        above = tl.where(enough, above, middle)
    room = budget - count_from(p_rank, excluded, num_tokens, least + 1, BLOCK_S)
    num_equal = 0
    num_kept = 0
    for i_s in range(excluded, num_tokens, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)
        m_s = o_s < num_tokens
        b_rank = tl.load(p_rank + o_s, mask=m_s, other=0).to(tl.int64)
        b_equal = (m_s & (b_rank == least)).to(tl.int32)
        b_fits = b_equal * (num_equal + tl.cumsum(b_equal) <= room).to(tl.int32)
        b_kept = b_fits + (m_s & (b_rank > least)).to(tl.int32)
        o_kept = num_kept + tl.cumsum(b_kept) - 1
        tl.store(p_index + o_kept, o_s, mask=b_kept != 0)
        num_equal += tl.sum(b_equal)
        num_kept += tl.sum(b_kept)


@triton.jit
def count_from(p_rank, first, stop, bound, BLOCK_S: tl.constexpr):
    """How many of the tokens ``[first, stop)`` rank `bound` or higher."""
    b_count = tl.zeros([BLOCK_S], tl.int32)
    for i_s in range(first, stop, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)
        b_rank = tl.load(p_rank + o_s, mask=o_s < stop, other=0).to(tl.int64)
        b_count += ((o_s < stop) & (b_rank >= bound)).to(tl.int32)
    return tl.sum(b_count)


@triton.jit(do_not_specialize=["budget"])
def gather_kv_kernel(
    p_index, p_k, p_v, p_out, budget,
    stride_kh, stride_ks, stride_kd, stride_vh, stride_vs, stride_vd,
    stride_op, stride_o2, stride_oh, stride_od,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys and values ``[P, D]`` of kept tokens of one head."""
    i_kv = tl.program_id(1).to(tl.int64)
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    m_p = o_p < budget
    m_value = m_p[:, None] & (o_d < D)[None, :]
    o_s = tl.load(p_index + i_kv * budget + o_p, mask=m_p, other=0).to(tl.int64)
    p_k_tile = p_k + i_kv * stride_kh + o_s[:, None] * stride_ks + o_d[None, :] * stride_kd
    p_v_tile = p_v + i_kv * stride_vh + o_s[:, None] * stride_vs + o_d[None, :] * stride_vd
    p_out_tile = p_out + i_kv * stride_oh + o_p.to(tl.int64)[:, None] * stride_op
    p_out_tile = p_out_tile + o_d[None, :] * stride_od
    b_k = tl.load(p_k_tile, mask=m_value, other=0.0)
    b_v = tl.load(p_v_tile, mask=m_value, other=0.0)
    tl.store(p_out_tile, b_k.to(p_out.dtype.element_ty), mask=m_value)
    tl.store(p_out_tile + stride_o2, b_v.to(p_out.dtype.element_ty), mask=m_value)


def _check(
    scores_KS: Tensor, k_KSD: Tensor, v_KSD: Tensor, out_P2KD: Tensor, pool: int, excluded: int
) -> None:
    if scores_KS.dim() != 2 or scores_KS.dtype != torch.float32:
        raise ValueError(
            f"scores_KS is {scores_KS.dtype} of shape {tuple(scores_KS.shape)}; "
            "torch.float32 of heads and tokens is wanted"
        )
    num_heads, num_tokens = scores_KS.shape
    for name, x in (("k_KSD", k_KSD), ("v_KSD", v_KSD)):
        if x.dim() != 3 or x.shape[:2] != scores_KS.shape or x.shape != k_KSD.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, scores {num_heads, num_tokens}, "
                f"keys {tuple(k_KSD.shape)}"
            )
        check_device(name, x, scores_KS)
    check_device("out_P2KD", out_P2KD, scores_KS)
    wanted = (2, num_heads, k_KSD.shape[2])
    if out_P2KD.dim() != 4 or out_P2KD.shape[1:] != wanted:
        raise ValueError(f"out_P2KD has shape {tuple(out_P2KD.shape)}; P and {wanted} are wanted")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"pool={pool} is not supported; supported are odd numbers")
    if excluded < 0 or out_P2KD.shape[0] > num_tokens - excluded:
        raise ValueError(
            f"{out_P2KD.shape[0]} tokens are to be kept of {num_tokens} without {excluded}"
        )
