"""KeyDiff compression: keys that point elsewhere than the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.compress.base import BlockView, Compressor, CompressorConfig


class KeydiffCompressor(Compressor):
    """Keeps the keys least similar to the mean direction of the block's keys, by cosine.

    After KeyDiff (Park et al. 2025, https://arxiv.org/abs/2504.15364, section 3.3). There a cache
    is pruned chunk by chunk as a document is read; a block is scored at once.
    """

    def score(self, block: BlockView) -> Tensor:
        norms_KS1 = torch.linalg.vector_norm(
            block.k_KSD, dim=-1, keepdim=True, dtype=torch.float32
        ).clamp_min(torch.finfo(torch.float32).tiny)
        k_KSD = block.k_KSD.float() / norms_KS1
        mean_KD1 = F.normalize(k_KSD.mean(dim=1), dim=-1)[..., None]
        cosine_KS: Tensor = (k_KSD @ mean_KD1)[..., 0]
        return -cosine_KS


@dataclass(kw_only=True, slots=True)
class KeydiffConfig(CompressorConfig):
    """Config of `KeydiffCompressor`."""

    def build(self, *, seed: int) -> KeydiffCompressor:
        return KeydiffCompressor()
