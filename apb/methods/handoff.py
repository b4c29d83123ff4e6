"""Moving the cache to its owner, layer by layer, while later layers still run."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from apb.cache import CacheShape, KVCacheShard
from apb.comm import Communicator, Kind, Pending, Tag
from apb.layout import SequenceLayout
from apb.methods.decode import OWNER

_IN_FLIGHT = 2
"""Layers that may be under way at once; each takes a copy of a shard's layer."""


class HandOff:
    """Takes every rank's new rows, as `KVSink`, and stores them all in the owner's cache.

    There they stand in rank order, so that `positions` is what the cache has to be committed with.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        shape: CacheShape,
        comm: Communicator,
        *,
        step: int,
        cache: KVCacheShard | None,
    ) -> None:
        """`cache` is the owner's, with room for the whole context, and None elsewhere."""
        self._layout, self._shape, self._comm, self._step = layout, shape, comm, step
        self._cache = cache
        self._under_way: deque[tuple[int, Pending[dict[int, Tensor]]]] = deque()
        self._senders = [
            rank
            for rank in range(layout.world_size)
            if rank != OWNER and layout.tokens_on(rank) > 0
        ]

    def write(self, layer_idx: int, k_KTD: Tensor, v_KTD: Tensor) -> None:
        outgoing, incoming = {}, {}
        if self._cache is not None:
            self._cache.write(layer_idx, k_KTD, v_KTD)
            incoming = {rank: self._message(rank) for rank in self._senders}
        elif self._comm.rank in self._senders:
            outgoing = {OWNER: torch.stack([k_KTD, v_KTD])}
        tag = Tag(self._step, layer_idx, Kind.SHARD)
        self._under_way.append((layer_idx, self._comm.exchange(outgoing, incoming, tag)))
        if len(self._under_way) > _IN_FLIGHT:
            self._settle()

    def finish(self) -> None:
        """Wait for what is still under way."""
        while self._under_way:
            self._settle()

    def positions(self) -> list[int]:
        """The context's positions in the order of the owner's cache."""
        return [
            position
            for rank in (OWNER, *self._senders)
            for block in self._layout.owned_by(rank)
            for position in range(block.start, block.stop)
        ]

    def _message(self, rank: int) -> Tensor:
        shape = (2, self._shape.num_kv_heads, self._layout.tokens_on(rank), self._shape.head_dim)
        return torch.empty(shape, dtype=self._shape.dtype, device="meta")

    def _settle(self) -> None:
        """Wait for the oldest layer and store it."""
        layer_idx, pending = self._under_way.popleft()
        start = self._layout.tokens_on(OWNER)
        arrived = pending.wait()
        for rank in self._senders:
            if self._cache is not None:
                self._cache.write(layer_idx, *arrived[rank], at=start)
            start += self._layout.tokens_on(rank)
