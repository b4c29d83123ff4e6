"""Random selection: the control every other compressor has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import BlockView, Compressor, CompressorConfig


class RandomCompressor(Compressor):
    """Uniform scores, distinct per layer, block and KV head, whatever the number of ranks."""

    def __init__(self, *, seed: int) -> None:
        self._seed = seed

    def score(self, block: BlockView) -> Tensor:
        # Drawn on the CPU: a device's own generator would keep other tokens than another device's.
        stream = (self._seed * 1_000_003 + block.layer_idx) * 1_000_003 + block.block_idx
        generator = torch.Generator().manual_seed(stream % 2**63)
        scores_KS = torch.rand(block.k_KSD.shape[:2], generator=generator)
        return scores_KS.to(block.k_KSD.device)


@dataclass(kw_only=True, slots=True)
class RandomConfig(CompressorConfig):
    """Config of `RandomCompressor`."""

    def build(self, *, seed: int) -> RandomCompressor:
        return RandomCompressor(seed=seed)
