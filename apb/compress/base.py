"""How a block is compressed: score every token per KV head, keep the best ones.

Letters: S tokens of the block, W observation rows, P kept tokens, H query heads, K key/value heads,
D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend
from apb.cost import ModelShape
from apb.errors import InputError
from apb.rotary import Rotary

ALL_ROWS = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressorTarget:
    """The model whose blocks a compressor will see, known from its configuration alone.

    Attributes:
        model: its name.
        hidden_act: what its MLPs call their activation.
        shipped: the folder of small weights that come with apb for it.
    """

    model: str
    shape: ModelShape
    hidden_act: str
    rotary: Rotary
    device: torch.device
    dtype: torch.dtype
    shipped: Path | None = None

    def require_whole_rotary(self, compressor: str) -> Rotary:
        """The rotary embedding, for a compressor that undoes it.

        Raises:
            InputError: it turns only a part of each head.
        """
        turned = 2 * len(self.rotary.inv_freq_F)
        if turned != self.shape.head_dim:
            raise InputError(
                f"method/compressor={compressor} needs RoPE on whole heads, and {self.model} turns "
                f"{turned} of {self.shape.head_dim} dimensions: choose another compressor"
            )
        return self.rotary


class BlockView(NamedTuple):
    """What a compressor may look at: one block in one layer, after RoPE.

    `start` is the position of its first token; the others follow without a gap. `query_HWD` are the
    query vectors of the question's tokens at their place in the anchor, or None where there is no
    question (see `observed_rows`).
    """

    layer_idx: int
    block_idx: int
    start: int
    q_HSD: Tensor
    k_KSD: Tensor
    v_KSD: Tensor
    scale: float
    query_HWD: Tensor | None = None

    def before_rope(self, rotary: Rotary, rows: slice = ALL_ROWS) -> tuple[Tensor, Tensor]:
        """Queries and keys of some rows as RoPE got them, in fp32: ``[H, T, D], [K, T, D]``.

        They are the projections, where the model norms these: normed.
        """
        q_HTD, k_KTD = self.q_HSD[:, rows], self.k_KSD[:, rows]
        first, stop, step = rows.indices(self.k_KSD.shape[1])
        positions_T = torch.arange(first, stop, step, device=k_KTD.device) + self.start
        rotation = rotary.at(positions_T)
        return rotation.unrotate(q_HTD.float()), rotation.unrotate(k_KTD.float())

    def from_row(self, row: int) -> BlockView:
        """The block without its first rows."""
        return self._replace(
            start=self.start + row,
            q_HSD=self.q_HSD[:, row:],
            k_KSD=self.k_KSD[:, row:],
            v_KSD=self.v_KSD[:, row:],
        )


class Compressor(ABC):
    """Selects a block's passing KV. A plug-in implements `score`."""

    needs_query: bool = False
    """Whether `BlockView.query_HWD` is read."""
    pool: int = 1
    """A token takes the best score among this many around it (odd), so that phrases stay whole."""

    def attach(self, target: CompressorTarget) -> None:  # noqa: B027
        """Get ready for a model, before its weights are loaded.

        Raises:
            InputError: the compressor does not fit it.
        """

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
