"""New tokens over the sharded cache: every rank attends to its shard, and the partials merge."""

from __future__ import annotations

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs, Segment
from apb.cache import KVCacheShard
from apb.comm import Communicator, Kind, Tag
from apb.methods.attended import BlockObserver

FEW_ROWS = 64
"""Up to so many new rows attend to all keys in one piece, under a mask over the new ones."""
OWNER = 0
"""The rank that holds query and generated KV, drafts, verifies and emits."""


class ShardedDecode:
    """Exact attention of a few new rows over document KV that stays where prefill left it.

    Every new row sees the whole document. Only the owner holds earlier new tokens, and only there
    is a causal rule applied; one gather per layer carries all partials, merged in rank order.
    """

    def __init__(
        self,
        cache: KVCacheShard,
        comm: Communicator,
        backend: AttentionBackend,
        observer: BlockObserver | None = None,
    ) -> None:
        self._cache, self._comm, self._backend = cache, comm, backend
        self._observer = observer
        self._step = 0
        self._visible_TT: Tensor | None = None

    def begin(self, step: int, visible_TT: Tensor | None = None) -> None:
        """A new pass; which of its rows see which, None for causal, is the owner's to know."""
        self._step, self._visible_TT = step, visible_TT

    @property
    def is_owner(self) -> bool:
        return self._comm.rank == OWNER

    def attend(self, layer: LayerInputs) -> Tensor:
        """Attention of the new rows ``out_THD``, the same on every rank."""
        partial = self._backend.attend(layer.q_HTD, self._segments(layer), scale=layer.scale)
        if self._comm.world_size > 1:
            packed_THE = torch.cat([partial.out_THD.float(), partial.lse_TH[..., None]], dim=-1)
            tag = Tag(self._step, layer.layer_idx, Kind.PARTIAL)
            gathered_RTHE = self._comm.all_gather(packed_THE, tag).wait()
            partial = self._backend.merge(gathered_RTHE)
        if self._observer is not None:
            self._observer.observe(layer, partial.lse_TH)
        return partial.out_THD

    def _segments(self, layer: LayerInputs) -> list[Segment]:
        num_rows = layer.q_HTD.shape[1]
        if not self.is_owner:
            return [Segment(0, num_rows, *self._cache.view(layer.layer_idx))]
        self._cache.write(layer.layer_idx, layer.k_KTD, layer.v_KTD)
        if num_rows > FEW_ROWS:
            return [
                Segment(0, num_rows, *self._cache.view(layer.layer_idx)),
                Segment(0, num_rows, layer.k_KTD, layer.v_KTD, causal=True),
            ]
        both = self._cache.view(layer.layer_idx, pending=num_rows)
        return [Segment(0, num_rows, *both, visible_TE=self._visible(num_rows, both[0].device))]

    def _visible(self, num_rows: int, device: torch.device) -> Tensor | None:
        """The rule among few new rows; a single one sees itself."""
        if self._visible_TT is None and num_rows > 1:
            # Kept for all layers, so that backends can keep what they make of it.
            self._visible_TT = torch.ones(
                num_rows, num_rows, dtype=torch.bool, device=device
            ).tril()
        return self._visible_TT
