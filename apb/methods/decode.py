"""New tokens over the sharded cache: every rank attends to its shard, and the partials merge."""

from __future__ import annotations

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs, Segment
from apb.cache import KVCacheShard
from apb.comm import Communicator, Kind, Tag

OWNER = 0
"""The rank that holds query and generated KV, drafts, verifies and emits."""


class ShardedDecode:
    """Exact attention of a few new rows over document KV that stays where prefill left it.

    Every new row sees the whole document. Only the owner holds earlier new tokens, and only there
    is a causal rule applied; one gather per layer carries all partials, merged in rank order.
    """

    def __init__(self, cache: KVCacheShard, comm: Communicator, backend: AttentionBackend) -> None:
        self._cache, self._comm, self._backend = cache, comm, backend
        self.step = 0
        self.visible_TT: Tensor | None = None
        """Which of the new rows see which; None is causal. Of use on the owner."""

    @property
    def is_owner(self) -> bool:
        return self._comm.rank == OWNER

    def attend(self, layer: LayerInputs) -> Tensor:
        """Attention of the new rows ``out_THD``, the same on every rank."""
        partial = self._backend.attend(layer.q_HTD, self._segments(layer), scale=layer.scale)
        if self._comm.world_size == 1:
            return partial.out_THD
        packed_THE = torch.cat([partial.out_THD.float(), partial.lse_TH[..., None]], dim=-1)
        tag = Tag(self.step, layer.layer_idx, Kind.PARTIAL)
        gathered_RTHE = self._comm.all_gather(packed_THE, tag).wait()
        return self._backend.merge(gathered_RTHE).out_THD

    def _segments(self, layer: LayerInputs) -> list[Segment]:
        num_rows = layer.q_HTD.shape[1]
        if not self.is_owner:
            return [Segment(0, num_rows, *self._cache.view(layer.layer_idx))]
        self._cache.write(layer.layer_idx, layer.k_KTD, layer.v_KTD)
        if num_rows == 1:  # a single new row sees itself: one segment and no merge
            return [Segment(0, 1, *self._cache.view(layer.layer_idx, pending=1))]
        return [
            Segment(0, num_rows, *self._cache.view(layer.layer_idx)),
            Segment(
                0,
                num_rows,
                layer.k_KTD,
                layer.v_KTD,
                causal=self.visible_TT is None,
                visible_TS=self.visible_TT,
            ),
        ]
