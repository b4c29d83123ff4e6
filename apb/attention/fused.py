"""The project's Triton kernels: one launch for all blocks and segments of a layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from apb.attention.base import (
    AttentionBackend,
    AttentionPartial,
    AttentionTarget,
    BackendConfig,
    Segment,
    check_flash_target,
)
from apb.errors import InputError


class FusedBackend(AttentionBackend):
    """Blocks side by side in one launch, received segments added in place, decoding split by keys.

    Raises:
        ImportError: Triton is not installed.
    """

    name: ClassVar[str] = "fused"

    def __init__(self) -> None:
        # Here and not above: configs of all backends are imported where Triton may be missing.
        from apb_kernels import decode_attention, merge, segment_attention, select_topk

        self._segments, self._decode = segment_attention, decode_attention
        self._merge, self._select = merge, select_topk
        self._length: tuple[int, Tensor] | None = None

    def attend(
        self,
        q_HTD: Tensor,
        segments: Sequence[Segment],
        *,
        scale: float,
        carry: AttentionPartial | None = None,
    ) -> AttentionPartial:
        if carry is None and self._is_decoding(q_HTD, segments):
            return self._attend_shard(q_HTD, segments[0], scale)
        if any(segment.visible_TE is not None for segment in segments):
            return super().attend(q_HTD, segments, scale=scale, carry=carry)
        known = None if carry is None else self._segments.Partial(*carry)
        found = self._segments.segment_attention(q_HTD, segments, scale=scale, carry=known)
        return AttentionPartial(*found)

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        segment = Segment(0, q_HTD.shape[1], k_KSD, v_KSD, causal)
        return self.attend(q_HTD, [segment], scale=scale)

    def merge(self, packed_RTHE: Tensor) -> AttentionPartial:
        return AttentionPartial(*self._merge.merge(packed_RTHE))

    def select_topk(
        self,
        scores_KS: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        out_P2KD: Tensor,
        *,
        pool: int,
        excluded: int,
    ) -> Tensor:
        return self._select.select_topk(
            scores_KS, k_KSD, v_KSD, out_P2KD, pool=pool, excluded=excluded
        )

    def _is_decoding(self, q_HTD: Tensor, segments: Sequence[Segment]) -> bool:
        """Whether few rows see one shard whole, but for the tail that they are themselves."""
        num_rows = q_HTD.shape[1]
        if len(segments) != 1 or not 1 <= num_rows <= self._decode.MAX_ROWS:
            return False
        (only,) = segments
        whole = (only.start, only.stop) == (0, num_rows) and not only.causal
        own = None if only.visible_TE is None else only.visible_TE.shape[1]
        return whole and own in (None, num_rows) and not only.without_tail().is_empty

    def _attend_shard(self, q_HTD: Tensor, segment: Segment, scale: float) -> AttentionPartial:
        shard = segment.without_tail()
        num_keys = shard.k_KSD.shape[1]
        if self._length is None or self._length[0] != num_keys:
            # Once per step, not once per layer, and without a copy that waits for the device.
            length = torch.full((1,), num_keys, dtype=torch.int32, device=q_HTD.device)
            self._length = num_keys, length
        tail = None
        if segment.visible_TE is not None:
            tail = self._decode.Tail(*segment.tail())
        found = self._decode.decode_attention(
            q_HTD, shard.k_KSD, shard.v_KSD, self._length[1], scale=scale, tail=tail
        )
        return AttentionPartial(*found)


@dataclass(kw_only=True, slots=True)
class FusedConfig(BackendConfig):
    """Config of `FusedBackend`."""

    def build(self, target: AttentionTarget) -> FusedBackend:
        if find_spec("triton") is None:
            raise InputError(
                "backend=fused needs Triton, which is not installed: pip install triton"
            )
        if target.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InputError(f"backend=fused does not support {target.dtype}; use backend=sdpa")
        check_flash_target("fused", target)
        if target.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError(
                "backend=fused needs a GPU; on a CPU use backend=sdpa "
                "(or TRITON_INTERPRET=1, for tests)"
            )
        return FusedBackend()
