"""TOVA compression: what the block's last token attends to, over all heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apb.compress.base import BlockView, Compressor, CompressorConfig


class TovaCompressor(Compressor):
    """Keeps the keys that the block's last row attends to most, the same ones for every head.

    After TOVA (Oren et al. 2024, https://arxiv.org/abs/2401.06104, section 3): softmax over the
    block, mean over all query heads. There a token is dropped at every step of decoding; a passing
    block is chosen once, by the block's last row, whose own key competes with the others.
    """

    def score(self, block: BlockView) -> Tensor:
        num_kv_heads = block.k_KSD.shape[0]
        q_KGD = block.q_HSD[:, -1].unflatten(0, (num_kv_heads, -1)).float() * block.scale
        probs_KGS = (q_KGD @ block.k_KSD.float().mT).softmax(dim=-1)
        scores_S: Tensor = probs_KGS.mean(dim=(0, 1))
        return scores_S.expand(num_kv_heads, -1)


@dataclass(kw_only=True, slots=True)
class TovaConfig(CompressorConfig):
    """Config of `TovaCompressor`."""

    def build(self, *, seed: int) -> TovaCompressor:
        return TovaCompressor()
