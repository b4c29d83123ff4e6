"""The one attention primitive: rows attend to segments, and partial results merge exactly.

Letters: T rows of this forward pass, S keys, E the last of them, H query heads, K key/value
heads, G = H / K, D head dim, R ranks. The batch is always one document and carries no dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from apb.attention.selection import select_topk
from apb.errors import InputError

_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """Keys and values that the rows ``[start, stop)`` see under one rule.

    `causal` means that row ``start + i`` sees keys ``0..i`` (as many keys as rows); otherwise every
    row sees every key, but of the last E keys those that `visible_TE` says, which is for a few rows
    alone: new tokens and trees of drafts. A row may see several segments; row ranges are equal or
    disjoint.
    """

    start: int
    stop: int
    k_KSD: Tensor
    v_KSD: Tensor
    causal: bool = False
    visible_TE: Tensor | None = None

    def __post_init__(self) -> None:
        assert not self.causal or self.k_KSD.shape[1] == self.stop - self.start
        if self.visible_TE is not None:
            assert not self.causal
            assert self.visible_TE.shape[0] == self.stop - self.start
            assert self.visible_TE.shape[1] <= self.k_KSD.shape[1]

    @property
    def is_empty(self) -> bool:
        return self.start == self.stop or self.k_KSD.shape[1] == 0

    def without_tail(self) -> Segment:
        """The keys before the last E, which all rows see."""
        stop = self.k_KSD.shape[1] - (0 if self.visible_TE is None else self.visible_TE.shape[1])
        return Segment(self.start, self.stop, self.k_KSD[:, :stop], self.v_KSD[:, :stop])

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last E keys and values, and which of them each row sees."""
        assert self.visible_TE is not None
        start = self.k_KSD.shape[1] - self.visible_TE.shape[1]
        return self.k_KSD[:, start:], self.v_KSD[:, start:], self.visible_TE


class LayerInputs(NamedTuple):
    """One layer's queries, keys and values after RoPE, for all rows of the forward pass."""

    layer_idx: int
    q_HTD: Tensor
    k_KTD: Tensor
    v_KTD: Tensor
    scale: float


class AttentionPartial(NamedTuple):
    """Softmax-weighted values and the log of the softmax's denominator (natural, scaled scores).

    Where a row saw no key, ``out`` is 0 and ``lse`` is -inf.
    """

    out_THD: Tensor
    lse_TH: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_heads: int, head_dim: int, like: Tensor) -> AttentionPartial:
        return cls(
            like.new_zeros((num_rows, num_heads, head_dim)),
            like.new_full(
                (num_rows, num_heads),
                float("-inf"),
                dtype=torch.promote_types(like.dtype, torch.float32),
            ),
        )


def merge_partials(partials: Sequence[AttentionPartial]) -> AttentionPartial:
    """The attention over the union of the keys, in the dtype of the lse, summed in the order given.

    The maximum is subtracted before exponentiating: log-sum-exps beyond 88 overflow otherwise.
    """
    lse_NTH = torch.stack([partial.lse_TH for partial in partials])
    peak_TH = lse_NTH.amax(dim=0)
    peak_TH = peak_TH.masked_fill(peak_TH == float("-inf"), 0.0)
    weight_NTH = (lse_NTH - peak_TH).exp()
    total_TH = weight_NTH.sum(dim=0)
    share_NTH = weight_NTH / total_TH.masked_fill(total_TH == 0.0, 1.0)
    out_THD = share_NTH[0, ..., None] * partials[0].out_THD
    for share_TH, partial in zip(share_NTH[1:], partials[1:], strict=True):
        out_THD = torch.addcmul(out_THD, share_TH[..., None], partial.out_THD.to(out_THD.dtype))
    return AttentionPartial(out_THD, peak_TH + total_TH.log())


def merge_into(carry: AttentionPartial, partial: AttentionPartial) -> None:
    """`merge_partials` of both, in the memory and the dtypes of the first."""
    if carry.out_THD.dtype != carry.lse_TH.dtype:  # too narrow to be summed up in
        merged = merge_partials([carry, partial])
        carry.out_THD.copy_(merged.out_THD)
        carry.lse_TH.copy_(merged.lse_TH)
        return
    lse_TH = torch.logaddexp(carry.lse_TH, partial.lse_TH)
    base_TH = lse_TH.masked_fill(lse_TH == float("-inf"), 0.0)
    kept_TH, added_TH = (carry.lse_TH - base_TH).exp(), (partial.lse_TH - base_TH).exp()
    carry.out_THD.mul_(kept_TH[..., None]).addcmul_(added_TH[..., None], partial.out_THD)
    carry.lse_TH.copy_(lse_TH)


def masked_attention(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, visible_TS: Tensor, scale: float
) -> AttentionPartial:
    """Attention under a dense boolean mask, in plain torch: the specification of other forms."""
    groups = q_HTD.shape[0] // k_KSD.shape[0]
    k_HSD = k_KSD.repeat_interleave(groups, dim=0)
    v_HSD = v_KSD.repeat_interleave(groups, dim=0)
    # At least fp32, and fp64 stays fp64 so that tests can measure everyone else's rounding.
    dtype = torch.promote_types(q_HTD.dtype, torch.float32)
    scores_HTS = q_HTD.to(dtype) @ k_HSD.to(dtype).mT * scale
    scores_HTS = scores_HTS.masked_fill(~visible_TS, float("-inf"))
    lse_HT = scores_HTS.logsumexp(dim=-1)
    # A row without a key has -inf everywhere; NaN must stay NaN, it is an error to be found.
    peak_HT = lse_HT.masked_fill(lse_HT == float("-inf"), 0.0)
    probs_HTS = (scores_HTS - peak_HT[..., None]).exp()
    out_HTD = probs_HTS @ v_HSD.to(dtype)
    return AttentionPartial(out_HTD.transpose(0, 1).to(q_HTD.dtype), lse_HT.mT)


class AttentionBackend(ABC):
    """A layer's device work besides the model's: attention of rows over segments, merging partials,
    selecting what is passed on. A plug-in implements `attend_segment`.
    """

    name: ClassVar[str]

    def attend(
        self,
        q_HTD: Tensor,
        segments: Sequence[Segment],
        *,
        scale: float,
        carry: AttentionPartial | None = None,
    ) -> AttentionPartial:
        """Attention of every row over the segments it sees and over what `carry` already covers.

        Args:
            q_HTD: all rows of the pass; GQA query head ``h`` uses key/value head ``h // G``.
            segments: may be empty; rows that no segment names keep `carry` or see nothing.
            scale: factor on the scores.
            carry: an earlier result for the same rows over other keys; it is used up.
        """
        num_heads, num_rows, head_dim = q_HTD.shape
        groups = _by_rows(segments)
        if carry is None and list(groups) == [(0, num_rows)]:
            return self._attend_group(q_HTD, groups[0, num_rows], scale)
        result = carry or AttentionPartial.empty(num_rows, num_heads, head_dim, q_HTD)
        for (start, stop), group in groups.items():
            partial = self._attend_group(q_HTD[:, start:stop], group, scale)
            rows = AttentionPartial(*(x[start:stop] for x in result))
            if carry is not None:
                merge_into(rows, partial)
            else:
                rows.out_THD.copy_(partial.out_THD)
                rows.lse_TH.copy_(partial.lse_TH)
        return result

    def _attend_group(
        self, q_HTD: Tensor, segments: Sequence[Segment], scale: float
    ) -> AttentionPartial:
        """Attention of rows over segments that all of them see."""
        partials = []
        for segment in segments:
            if segment.visible_TE is not None:
                k_KED, v_KED, visible_TE = segment.tail()
                partials.append(masked_attention(q_HTD, k_KED, v_KED, visible_TE, scale))
                segment = segment.without_tail()
            if not segment.is_empty:
                k_KSD, v_KSD = segment.k_KSD, segment.v_KSD
                partial = self.attend_segment(
                    q_HTD, k_KSD, v_KSD, causal=segment.causal, scale=scale
                )
                partials.append(partial)
        return partials[0] if len(partials) == 1 else merge_partials(partials)

    def merge(self, packed_RTHE: Tensor) -> AttentionPartial:
        """`merge_partials` of what was gathered, outputs and lse side by side (E = D + 1)."""
        return merge_partials(
            [AttentionPartial(x_THE[..., :-1], x_THE[..., -1]) for x_THE in packed_RTHE]
        )

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
        """Write the KV of the P best tokens per head to a part of a message; see `select_topk`."""
        return select_topk(scores_KS, k_KSD, v_KSD, out_P2KD, pool=pool, excluded=excluded)

    @abstractmethod
    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        """Attention of all given rows over one segment with at least one row and one key."""


def _by_rows(segments: Sequence[Segment]) -> dict[tuple[int, int], list[Segment]]:
    groups: dict[tuple[int, int], list[Segment]] = {}
    for segment in segments:
        if not segment.is_empty:
            groups.setdefault((segment.start, segment.stop), []).append(segment)
    return groups


class AttentionTarget(NamedTuple):
    """What a backend is to work on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


def check_flash_target(backend: str, target: AttentionTarget) -> None:
    """Refuse what no kernel in the manner of FlashAttention-2 takes.

    Raises:
        InputError: an older GPU, or a head size that is not supported.
    """
    has_gpu = target.device.type == "cuda" and torch.cuda.is_available()
    if has_gpu and torch.cuda.get_device_capability(target.device) < (8, 0):
        raise InputError(f"backend={backend} needs a GPU of Ampere or later; use backend=sdpa")
    if target.head_dim % 8 or target.head_dim > _MAX_HEAD_DIM:
        raise InputError(
            f"backend={backend} does not support heads of {target.head_dim}; use backend=sdpa"
        )


@dataclass(kw_only=True, slots=True)
class BackendConfig(ABC):
    """Config of a backend."""

    @abstractmethod
    def build(self, target: AttentionTarget) -> AttentionBackend:
        """The backend, before any weight is read.

        Raises:
            InputError: it cannot be used there, and what can.
        """
