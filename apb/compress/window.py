"""Observation-window compression: what the block's last rows attend to.

Letters beside those of `base`: G query heads of a group, X = G W.
"""

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
        q_HWD = block.q_HSD[:, -rows:].float() * block.scale
        q_KXD = q_HWD.unflatten(0, (num_kv_heads, -1)).flatten(1, 2)
        logits_KXS = q_KXD @ block.k_KSD.float().mT
        future_WW = torch.ones(rows, rows, dtype=torch.bool, device=q_KXD.device).triu(1)
        window_KGWW = logits_KXS[..., -rows:].unflatten(1, (-1, rows))
        window_KGWW.masked_fill_(future_WW, float("-inf"))
        scores_KS: Tensor = logits_KXS.softmax(dim=-1).mean(dim=1)
        return scores_KS


@dataclass(kw_only=True, slots=True)
class WindowConfig(ObservationConfig):
    """Config of `WindowCompressor`."""

    def build(self, *, seed: int) -> WindowCompressor:
        return WindowCompressor(window=self.window, kernel=self.kernel)
