"""torch's own fused attention, through the ATen operators that also return the log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from apb.attention.base import (
    AttentionBackend,
    AttentionPartial,
    AttentionTarget,
    BackendConfig,
    Segment,
)

_MOST_MASKED = 1 << 24
"""Scores of few rows that are masked in one piece: 64 MiB of fp32."""
_FEW_ROWS = 32
"""Below this the heads of a group are stacked as rows, which costs a copy of the queries."""


class SdpaBackend(AttentionBackend):
    """CPU: ATen's flash kernel. CUDA: flash for fp16 and bf16, memory-efficient for fp32.

    No mask is materialised and no head is copied on the CPU: grouped heads are views with stride 0.
    """

    name: ClassVar[str] = "sdpa"

    def __init__(self) -> None:
        self._mask: _RowMask | None = None

    def _attend_group(
        self, q_HTD: Tensor, segments: Sequence[Segment], scale: float
    ) -> AttentionPartial:
        """Decoding on the CPU is one call: of little work, so that every operation counts."""
        visible_TE = segments[0].visible_TE if len(segments) == 1 else None
        if visible_TE is None or q_HTD.device.type != "cpu":
            return super()._attend_group(q_HTD, segments, scale)
        k_KSD, v_KSD = segments[0].k_KSD, segments[0].v_KSD
        shape = (q_HTD.shape[0], *k_KSD.shape[:2])
        if shape[0] // shape[1] * visible_TE.shape[0] * shape[2] > _MOST_MASKED:
            return super()._attend_group(q_HTD, segments, scale)
        if not self._mask or self._mask.visible_TE is not visible_TE or self._mask.shape != shape:
            # Once per pass, not once per layer.
            self._mask = _RowMask.of(visible_TE, shape, q_HTD.dtype)
        return _cpu_flash(
            q_HTD, k_KSD, v_KSD, causal=False, scale=scale, bias_RS=self._mask.bias_RS
        )

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        if q_HTD.device.type == "cpu":
            return _cpu_flash(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)
        has_flash = torch.cuda.get_device_capability(q_HTD.device) >= (8, 0)
        if has_flash and q_HTD.dtype in (torch.float16, torch.bfloat16):
            return _cuda_flash(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)
        return _cuda_efficient(q_HTD, k_KSD, v_KSD, causal=causal, scale=scale)


class _RowMask(NamedTuple):
    """What is added to scores so that rows see their part of the last keys."""

    visible_TE: Tensor
    shape: tuple[int, int, int]
    """Query heads, key heads, keys."""
    bias_RS: Tensor
    """For the rows of all heads of a group, one head after the other."""

    @classmethod
    def of(cls, visible_TE: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> _RowMask:
        num_heads, num_kv_heads, num_keys = shape
        num_rows, num_last = visible_TE.shape
        bias_GTS = torch.zeros(num_heads // num_kv_heads, num_rows, num_keys, dtype=dtype)
        bias_GTS[..., num_keys - num_last :].masked_fill_(~visible_TE, float("-inf"))
        return cls(visible_TE, shape, bias_GTS.flatten(0, 1))


def _cpu_flash(
    q_HTD: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    *,
    causal: bool,
    scale: float,
    bias_RS: Tensor | None = None,
) -> AttentionPartial:
    """`bias_RS` is for few rows alone, those of all heads of a group."""
    q_KGTD = q_HTD.unflatten(0, (k_KSD.shape[0], -1))
    if causal or (bias_RS is None and q_KGTD.shape[2] >= _FEW_ROWS):
        queries, keys, values = q_KGTD, *_as_batch(q_KGTD, k_KSD, v_KSD)
    else:
        # The heads of a group are just more rows over the same keys.
        queries, keys, values = q_KGTD.flatten(1, 2)[None], k_KSD[None], v_KSD[None]
    mask = None if bias_RS is None else bias_RS[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, attn_mask=mask, scale=scale
    )
    out_KGTD, lse_KGT = out.reshape(q_KGTD.shape), lse.reshape(q_KGTD.shape[:3])
    return _ungrouped(out_KGTD, lse_KGT)


def _as_batch(q_KGTD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as ``[K, G, S, D]``: key heads as the batch, a group's heads of stride 0."""
    groups = q_KGTD.shape[1]
    return k_KSD[:, None].expand(-1, groups, -1, -1), v_KSD[:, None].expand(-1, groups, -1, -1)


def _ungrouped(out_KGTD: Tensor, lse_KGT: Tensor) -> AttentionPartial:
    return AttentionPartial(
        out_KGTD.permute(2, 0, 1, 3).flatten(1, 2), lse_KGT.permute(2, 0, 1).flatten(1)
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
    q_KGTD = q_HTD.unflatten(0, (k_KSD.shape[0], -1))
    k_KGSD, v_KGSD = _as_batch(q_KGTD, k_KSD, v_KSD)
    out_KGTD, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_KGTD, k_KGSD, v_KGSD, None, True, 0.0, causal, scale=scale
    )
    # This kernel pads its log-sum-exps to a multiple of 32 rows.
    return _ungrouped(out_KGTD, lse[:, :, : q_HTD.shape[1]])


@dataclass(kw_only=True, slots=True)
class SdpaConfig(BackendConfig):
    """Config of `SdpaBackend`."""

    def build(self, target: AttentionTarget) -> SdpaBackend:
        return SdpaBackend()
