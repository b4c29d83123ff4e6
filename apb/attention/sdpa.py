"""torch's own fused attention, through the ATen operators that also return the log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, AttentionPartial, BackendConfig


class SdpaBackend(AttentionBackend):
    """CPU: ATen's flash kernel. CUDA: flash for fp16 and bf16, memory-efficient for fp32.

    No mask is materialised and no head is copied on the CPU: grouped heads are views with stride 0.
    """

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        if q_HTD.device.type == "cpu":
            return _cpu_flash(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)
        if q_HTD.dtype in (torch.float16, torch.bfloat16):
            return _cuda_flash(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)
        return _cuda_efficient(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)


def _cpu_flash(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
) -> AttentionPartial:
    num_heads, num_rows, head_dim = q_HTD.shape
    num_kv_heads, num_keys, _ = k_KSD.shape
    groups = num_heads // num_kv_heads
    q_KGTD = q_HTD.unflatten(0, (num_kv_heads, groups))
    if causal:
        # The kernel wants as many key heads as query heads; as (K, G) they are a view of stride 0.
        shape = (num_kv_heads, groups, num_keys, head_dim)
        keys, values = k_KSD[:, None].expand(shape), v_KSD[:, None].expand(shape)
        queries = q_KGTD
    else:
        # Without a mask the heads of a group are just more rows over the same keys.
        queries, keys, values = q_KGTD.flatten(1, 2)[None], k_KSD[None], v_KSD[None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, scale=scale
    )
    return AttentionPartial(
        out.reshape(num_heads, num_rows, head_dim).transpose(0, 1),
        lse.reshape(num_heads, num_rows).mT,
    )


def _cuda_flash(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
) -> AttentionPartial:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q_HTD[None], k_KSD[None], v_KSD[None], 0.0, causal, False, scale=scale
    )
    return AttentionPartial(out[0].transpose(0, 1), lse[0].mT)


def _cuda_efficient(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
) -> AttentionPartial:
    groups = q_HTD.shape[0] // k_KSD.shape[0]
    k_HSD = k_KSD.repeat_interleave(groups, dim=0)
    v_HSD = v_KSD.repeat_interleave(groups, dim=0)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_HTD[None], k_HSD[None], v_HSD[None], None, True, 0.0, causal, scale=scale
    )
    # This kernel pads its log-sum-exps to a multiple of 32 rows.
    return AttentionPartial(out[0].transpose(0, 1), lse[0, :, : q_HTD.shape[1]].mT)


@dataclass(kw_only=True, slots=True)
class SdpaConfig(BackendConfig):
    """Config of `SdpaBackend`."""

    def build(self) -> SdpaBackend:
        return SdpaBackend()
