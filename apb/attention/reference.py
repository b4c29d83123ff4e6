"""The specification of attention over segments, in plain torch, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.attention.base import (
    AttentionBackend,
    AttentionPartial,
    AttentionTarget,
    BackendConfig,
    Segment,
    masked_attention,
    merge_partials,
)


class ReferenceBackend(AttentionBackend):
    """One softmax over all segments under a dense boolean mask.

    It holds a mask of all rows by all keys, so it is for tests and short inputs.
    """

    name: ClassVar[str] = "reference"

    def attend(
        self,
        q_HTD: Tensor,
        segments: Sequence[Segment],
        *,
        scale: float,
        carry: AttentionPartial | None = None,
    ) -> AttentionPartial:
        num_heads, num_rows, head_dim = q_HTD.shape
        partial = AttentionPartial.empty(num_rows, num_heads, head_dim, q_HTD)
        if segments:
            k_KSD = torch.cat([segment.k_KSD for segment in segments], dim=1)
            v_KSD = torch.cat([segment.v_KSD for segment in segments], dim=1)
            visible_TS = torch.cat([_visible(segment, num_rows) for segment in segments], dim=1)
            partial = masked_attention(q_HTD, k_KSD, v_KSD, visible_TS.to(q_HTD.device), scale)
        return partial if carry is None else merge_partials([carry, partial])

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        segment = Segment(0, q_HTD.shape[1], k_KSD, v_KSD, causal)
        return self.attend(q_HTD, [segment], scale=scale)


def _visible(segment: Segment, num_rows: int) -> Tensor:
    """Which rows see which keys of the segment: bool ``[T, S]``."""
    row_T1 = torch.arange(num_rows)[:, None]
    key_1S = torch.arange(segment.k_KSD.shape[1])[None, :]
    in_range_T1 = (row_T1 >= segment.start) & (row_T1 < segment.stop)
    rule_TS = key_1S <= row_T1 - segment.start if segment.causal else key_1S >= 0
    visible_TS = in_range_T1 & rule_TS
    if segment.visible_TE is not None:
        start = key_1S.shape[1] - segment.visible_TE.shape[1]
        visible_TS[segment.start : segment.stop, start:] = segment.visible_TE
    return visible_TS


@dataclass(kw_only=True, slots=True)
class ReferenceConfig(BackendConfig):
    """Config of `ReferenceBackend`."""

    def build(self, target: AttentionTarget) -> ReferenceBackend:
        return ReferenceBackend()
