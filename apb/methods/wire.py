"""How keys and values look while they travel between ranks.

Letters: N tokens, K key/value heads, D head dim, Y bytes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

_SCALE_BYTES = 4


class WireFormat(Enum):
    """`auto`: the model's dtype. `bfloat16`. `int8`: with a scale per token and head."""

    auto = "auto"
    bfloat16 = "bfloat16"
    int8 = "int8"

    def element_bytes(self, head_dim: int) -> float | None:
        """What an element takes on the way, for the cost model; None is what the model's takes."""
        if self is WireFormat.auto:
            return None
        return 2.0 if self is WireFormat.bfloat16 else 1 + _SCALE_BYTES / head_dim


@dataclass(frozen=True, slots=True)
class Wire:
    """Encodes tokens one by one, so that a prefix of a message is a message."""

    format: WireFormat
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """The model's."""

    def empty(self, num_tokens: int) -> Tensor:
        """Shape and dtype of a message, on the meta device."""
        heads = 2 * self.num_kv_heads
        if self.format is WireFormat.int8:
            size, dtype = heads * (self.head_dim + _SCALE_BYTES), torch.uint8
        else:
            size, dtype = heads * self.head_dim, self._element
        return torch.empty((num_tokens, size), dtype=dtype, device="meta")

    @property
    def _element(self) -> torch.dtype:
        return torch.bfloat16 if self.format is WireFormat.bfloat16 else self.dtype

    def unsent(self, num_tokens: int, device: torch.device) -> Tensor:
        """Room for tokens to be encoded, ``[N, 2, K, D]``: the message itself unless int8."""
        dtype = self.dtype if self.format is WireFormat.int8 else self._element
        shape = (num_tokens, 2, self.num_kv_heads, self.head_dim)
        return torch.empty(shape, dtype=dtype, device=device)

    def encode(self, kv_N2KD: Tensor) -> Tensor:
        """One row per token."""
        if self.format is not WireFormat.int8:
            return kv_N2KD.to(self._element).flatten(1)
        wide_N2KD = kv_N2KD.float()
        scale_N2K1 = wide_N2KD.abs().amax(dim=-1, keepdim=True) / 127
        steps_N2KD = wide_N2KD / scale_N2K1.masked_fill(scale_N2K1 == 0, 1)
        parts = (steps_N2KD.round().to(torch.int8), scale_N2K1)
        return torch.cat([part.flatten(1).view(torch.uint8) for part in parts], dim=1)

    def decode(self, rows_NY: Tensor) -> Tensor:
        """What `encode` was given, as far as the format keeps it: ``[N, 2, K, D]``."""
        shape = (rows_NY.shape[0], 2, self.num_kv_heads, self.head_dim)
        if self.format is not WireFormat.int8:
            return rows_NY.view(shape).to(self.dtype)
        heads = 2 * self.num_kv_heads
        steps, scale = rows_NY.split([heads * self.head_dim, heads * _SCALE_BYTES], dim=1)
        # A copy even where it is contiguous: a view of 4-byte elements has to start at one.
        aligned = scale.clone(memory_format=torch.contiguous_format)
        scale_N2K1 = aligned.view(torch.float32).view(*shape[:3], 1)
        steps_N2KD = steps.contiguous().view(torch.int8).view(shape)
        kv_N2KD: Tensor = (steps_N2KD * scale_N2K1).to(self.dtype)
        return kv_N2KD
