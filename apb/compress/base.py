"""How a block is compressed: score every token per KV head, keep the best ones.

Letters: S tokens of the block, W observation rows, P kept tokens, H query heads, K key/value heads,
D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend
from apb.errors import InputError


class BlockView(NamedTuple):
    """What a compressor may look at: one block in one layer, after RoPE.

    `query_HWD` are the query vectors of the question's tokens at their place in the anchor, or None
    where there is no question (see `observed_rows`).
    """

    layer_idx: int
    block_idx: int
    q_HSD: Tensor
    k_KSD: Tensor
    v_KSD: Tensor
    scale: float
    query_HWD: Tensor | None = None


class Compressor(ABC):
    """Selects a block's passing KV. A plug-in implements `score`."""

    needs_query: ClassVar[bool] = False
    pool: int = 1
    """A token takes the best score among this many around it (odd), so that phrases stay whole."""

    @abstractmethod
    def score(self, block: BlockView) -> Tensor:
        """Scores ``[K, S]`` in fp32 of the block's tokens per KV head; once pooled, the highest are
        kept.
        """

    def select(
        self,
        block: BlockView,
        out_P2KD: Tensor,
        *,
        backend: AttentionBackend,
        excluded: int = 0,
    ) -> Tensor:
        """Write the KV of the P best tokens per KV head, in the order of the text, to `out_P2KD`.

        Keys keep their true RoPE positions. Of equal scores the earliest are kept.

        Args:
            out_P2KD: a part of the message, in the dtype of the wire.
            backend: whose kernels select.
            excluded: that many tokens at the beginning are never kept.

        Returns:
            Positions of the kept tokens within the block, ascending: ``[K, P]``.

        Raises:
            AssertionError: the block cannot give that many tokens.
        """
        num_heads, num_tokens, _ = block.k_KSD.shape
        budget = out_P2KD.shape[0]
        assert budget <= num_tokens - excluded, "the plan asks for more tokens than there are"
        if budget < num_tokens - excluded:
            return backend.select_topk(
                self.score(block),
                block.k_KSD,
                block.v_KSD,
                out_P2KD,
                pool=self.pool,
                excluded=excluded,
            )
        out_P2KD[:, 0] = block.k_KSD[:, excluded:].transpose(0, 1)
        out_P2KD[:, 1] = block.v_KSD[:, excluded:].transpose(0, 1)
        kept_P = torch.arange(excluded, num_tokens, device=block.k_KSD.device)
        return kept_P.expand(num_heads, -1)


def observed_rows(block: BlockView, window: int) -> Tensor:
    """The rows that stand for the question: its own, or the block's last `window` without one."""
    return block.q_HSD[:, -window:] if block.query_HWD is None else block.query_HWD


@dataclass(kw_only=True, slots=True)
class CompressorConfig(ABC):
    """Config of a compressor."""

    @abstractmethod
    def build(self, *, seed: int) -> Compressor: ...


@dataclass(kw_only=True, slots=True)
class ObservationConfig(CompressorConfig):
    """Config of compressors that observe rows: how many, and the width of the pooling (odd)."""

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"method.compressor.window={self.window} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"method.compressor.kernel={self.kernel} must be odd and positive")
