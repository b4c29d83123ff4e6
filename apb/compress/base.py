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


class PassingBlock(NamedTuple):
    """The kept KV of a block, in the order of the text. Keys keep their true RoPE positions."""

    k_KPD: Tensor
    v_KPD: Tensor


class Compressor(ABC):
    """Selects a block's passing KV. A plug-in implements `score`."""

    needs_query: ClassVar[bool] = False

    @abstractmethod
    def score(self, block: BlockView) -> Tensor:
        """Scores ``[K, S]`` of the block's tokens per KV head; the highest are kept."""

    def select(self, block: BlockView, *, budget: int, excluded: int = 0) -> PassingBlock:
        """The `budget` best tokens per KV head, never one of the first `excluded`.

        Raises:
            AssertionError: the block cannot give that many tokens.
        """
        index_KP = self.select_indices(block, budget=budget, excluded=excluded)
        index_KPD = index_KP[..., None].expand(-1, -1, block.k_KSD.shape[-1])
        return PassingBlock(block.k_KSD.gather(1, index_KPD), block.v_KSD.gather(1, index_KPD))

    def select_indices(self, block: BlockView, *, budget: int, excluded: int = 0) -> Tensor:
        """Positions within the block of the kept tokens, ascending: ``[K, P]``."""
        num_tokens = block.k_KSD.shape[1]
        assert 0 <= budget <= num_tokens - excluded, "the plan asks for more tokens than there are"
        if budget == num_tokens - excluded:
            kept_P = torch.arange(excluded, num_tokens, device=block.k_KSD.device)
            return kept_P.expand(block.k_KSD.shape[0], -1)
        scores_KS = self.score(block)[:, excluded:]
        return scores_KS.topk(budget, dim=-1).indices.sort(dim=-1).values + excluded


def observed_rows(block: BlockView, window: int) -> Tensor:
    """The rows that stand for the question: its own, or the block's last `window` without one."""
    return block.q_HSD[:, -window:] if block.query_HWD is None else block.query_HWD


def max_pool(scores_KS: Tensor, kernel: int) -> Tensor:
    """Each token takes the best score of its neighbourhood, so that phrases are kept whole."""
    return torch.nn.functional.max_pool1d(scores_KS, kernel, stride=1, padding=kernel // 2)


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
