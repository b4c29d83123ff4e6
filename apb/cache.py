"""One rank's share of the KV cache. It stores and hands out views; it never communicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CacheShape(NamedTuple):
    """What a model caches per token: ``num_layers * 2 * num_kv_heads * head_dim`` elements."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCacheShard:
    """KV of some tokens at their true positions, for every layer, in one preallocated buffer.

    A forward pass writes each layer's new rows behind the committed ones and commits them once all
    layers are done, so a pass that fails half-way leaves the shard as it was.
    """

    def __init__(self, shape: CacheShape, *, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._positions_S = torch.empty(capacity, dtype=torch.int64, device=device)
        self._kv_L2KSD = torch.empty(
            (shape.num_layers, 2, shape.num_kv_heads, capacity, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        self._length = 0

    def __len__(self) -> int:
        """Number of committed tokens."""
        return self._length

    @property
    def positions_S(self) -> Tensor:
        return self._positions_S[: self._length]

    def write(self, layer_idx: int, k_KTD: Tensor, v_KTD: Tensor, *, at: int = 0) -> None:
        """Store one layer's new rows, `at` rows behind the committed ones."""
        start = self._length + at
        stop = start + k_KTD.shape[1]
        assert stop <= self.capacity, f"cache of {self.capacity} tokens cannot hold {stop}"
        self._kv_L2KSD[layer_idx, 0, :, start:stop] = k_KTD
        self._kv_L2KSD[layer_idx, 1, :, start:stop] = v_KTD

    def view(self, layer_idx: int, *, pending: int = 0) -> tuple[Tensor, Tensor]:
        """One layer's keys and values ``[K, S, D]``: committed rows and `pending` written ones."""
        kv_2KSD = self._kv_L2KSD[layer_idx, :, :, : self._length + pending]
        return kv_2KSD[0], kv_2KSD[1]

    def first_not_finite(self, num_tokens: int) -> int | None:
        """The first layer with NaN or infinity among the first tokens' keys or values."""
        layers = self._kv_L2KSD[:, :, :, :num_tokens]
        return next((idx for idx, kv in enumerate(layers) if not kv.isfinite().all()), None)

    def commit(self, positions_T: Tensor) -> None:
        """Make the rows that every layer has just written part of the shard."""
        stop = self._length + positions_T.shape[0]
        self._positions_S[self._length : stop] = positions_T
        self._length = stop

    def keep(self, rows: Sequence[int], positions_T: Tensor) -> None:
        """Commit some of the rows just written, closing the gaps that the others leave."""
        if list(rows) != list(range(len(rows))):
            rows_T = torch.tensor(rows, dtype=torch.int64, device=self._kv_L2KSD.device)
            kept = self._kv_L2KSD[:, :, :, self._length + rows_T]
            self._kv_L2KSD[:, :, :, self._length : self._length + len(rows)] = kept
        self.commit(positions_T)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        assert 0 <= length <= self._length
        self._length = length
