"""Key-norm compression: keys of small norm tend to receive the most attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import BlockView, Compressor, CompressorConfig


class KnormCompressor(Compressor):
    """Keeps the keys of smallest L2 norm (Devoto et al. 2024, https://arxiv.org/abs/2406.11430)."""

    def score(self, block: BlockView) -> Tensor:
        norms_KS: Tensor = torch.linalg.vector_norm(block.k_KSD, dim=-1, dtype=torch.float32)
        return -norms_KS


@dataclass(kw_only=True, slots=True)
class KnormConfig(CompressorConfig):
    """Config of `KnormCompressor`."""

    def build(self, *, seed: int) -> KnormCompressor:
        return KnormCompressor()
