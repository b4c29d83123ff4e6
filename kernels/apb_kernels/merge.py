"""Partial results to one, from the buffer in which they were gathered.

Letters: N partials, T rows, H query heads, D head dim, E = D + 1 (the values, then the lse).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apb_kernels.segment_attention import Partial

_TILE_ROWS = 16


def merge(packed_NTHE: Tensor, *, dtype: torch.dtype = torch.float32) -> Partial:
    """The attention over the union of the partials' keys, summed in their order.

    The running maximum is subtracted before anything is exponentiated, so that log-sum-exps of any
    size merge; partials without keys (lse -inf) change nothing.

    Args:
        packed_NTHE: fp32; ``[..., :-1]`` is a partial's output and ``[..., -1]`` its lse.
        dtype: of the merged output; its lse is fp32.

    Raises:
        ValueError: another dtype or shape, or the last dimension is not contiguous.
    """
    if packed_NTHE.dim() != 4 or packed_NTHE.shape[0] == 0 or packed_NTHE.shape[3] < 2:
        raise ValueError(
            f"packed_NTHE has shape {tuple(packed_NTHE.shape)}; "
            "partials, rows, heads, head size + 1 are wanted"
        )
    if packed_NTHE.dtype != torch.float32:
        raise ValueError(f"packed_NTHE.dtype={packed_NTHE.dtype} is not torch.float32")
    if packed_NTHE.stride(3) != 1:
        raise ValueError(f"packed_NTHE.stride(3)={packed_NTHE.stride(3)}; 1 is wanted")
    count, num_rows, num_heads, packed_dim = packed_NTHE.shape
    head_dim = packed_dim - 1
    out_THD = torch.empty((num_rows, num_heads, head_dim), dtype=dtype, device=packed_NTHE.device)
    lse_TH = torch.empty((num_rows, num_heads), dtype=torch.float32, device=packed_NTHE.device)
    if num_rows and num_heads:
        with torch.cuda.device_of(packed_NTHE):
            merge_kernel[(triton.cdiv(num_rows * num_heads, _TILE_ROWS),)](
                packed_NTHE,
                out_THD,
                lse_TH,
                count,
                num_rows * num_heads,
                num_heads,
                *packed_NTHE.stride()[:3],
                D=head_dim,
                BLOCK_R=_TILE_ROWS,
                BLOCK_D=triton.next_power_of_2(head_dim),
            )
    return Partial(out_THD, lse_TH)


@triton.jit(do_not_specialize=["count", "num_rows"])
def merge_kernel(
    p_packed, p_out, p_lse, count, num_rows, num_heads, stride_n, stride_t, stride_h,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """R rows of T x H: one pass over the partials with a running maximum."""
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < num_rows
    m_value = m_row[:, None] & (o_d < D)[None, :]
    o_t = (o_row // num_heads).to(tl.int64)
    p_rows = p_packed + o_t * stride_t + (o_row % num_heads) * stride_h
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_n in range(count):
        p_partial = p_rows + tl.cast(i_n, tl.int64) * stride_n
        b_lse = tl.load(p_partial + D, mask=m_row, other=float("-inf"))
        b_out = tl.load(p_partial[:, None] + o_d[None, :], mask=m_value, other=0.0)
        b_peak = tl.maximum(b_max, b_lse)
        # Until a partial has keys, both are -inf, and their difference would be NaN.
        b_base = tl.where(b_peak == float("-inf"), 0.0, b_peak)
        b_decay = tl.exp(b_max - b_base)
        b_weight = tl.exp(b_lse - b_base)
        b_sum = b_sum * b_decay + b_weight
        b_acc = b_acc * b_decay[:, None] + b_out * b_weight[:, None]
        b_max = b_peak
    b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_out_tile = p_out + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out_tile, b_acc.to(p_out.dtype.element_ty), mask=m_value)
    tl.store(p_lse + o_row, b_max + tl.log(b_sum), mask=m_row)
