"""Observation-window compression: what the block's last rows attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import BlockView, Compressor, ObservationConfig


class WindowCompressor(Compressor):
    """Keeps the keys that the block's last `window` rows attend to most.

    After SnapKV (Li et al. 2024, https://arxiv.org/abs/2404.14469, section 4): causal softmax over
    the block, mean over the window and the heads of a group, max-pooled. Unlike there, the window's
    own keys compete with the others: a passing block is read by later blocks, not continued.
    """

    def __init__(self, *, window: int, kernel: int) -> None:
        self._window, self.pool = window, kernel

    def score(self, block: BlockView) -> Tensor:
        num_kv_heads, num_tokens, _ = block.k_KSD.shape
        rows = min(self._window, num_tokens)
        q_KGWD = block.q_HSD[:, -rows:].unflatten(0, (num_kv_heads, -1)).float()
        scores_KGWS = q_KGWD @ block.k_KSD[:, None].float().mT * block.scale
        future_WS = torch.ones(rows, num_tokens, dtype=torch.bool, device=q_KGWD.device).triu(
            num_tokens - rows + 1
        )
        probs_KGWS = scores_KGWS.masked_fill(future_WS, float("-inf")).softmax(dim=-1)
        scores_KS: Tensor = probs_KGWS.mean(dim=(1, 2))
        return scores_KS


@dataclass(kw_only=True, slots=True)
class WindowConfig(ObservationConfig):
    """Config of `WindowCompressor`."""

    def build(self, *, seed: int) -> WindowCompressor:
        return WindowCompressor(window=self.window, kernel=self.kernel)
