"""Expected attention: what queries that are still to come will attend to, by their distribution.

Letters beside those of `base`: G query heads of a group, F future positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.compress.base import BlockView, Compressor, CompressorConfig, CompressorTarget
from apb.errors import InputError
from apb.rotary import Rotary, Rotation

NAME = "expected_attention"
_TINY = torch.finfo(torch.float32).tiny


class ExpectedAttentionCompressor(Compressor):
    """Keeps the tokens whose values add most to the attention of future queries, as expected.

    After Devoto et al. 2025 (https://arxiv.org/abs/2510.00636, section 3): queries before RoPE are
    taken as normally distributed, with the mean and covariance of the block's own; RoPE is averaged
    over the `future` positions after the block; the expectation of exp(q.k) follows in closed form,
    is normalised over the block, averaged over the heads of a group and multiplied by the norm of
    the value (in place of the norm after the output projection). Scores are logarithms of that.
    Queries of the first `sinks` positions of a text are outliers and left out; of the others every
    n-th tells the distribution, so that no more than `rows` do.
    """

    def __init__(self, *, future: int, sinks: int, rows: int, covariance: bool) -> None:
        self._future, self._sinks, self._rows = future, sinks, rows
        self._covariance = covariance
        self._rotary: Rotary | None = None

    def attach(self, target: CompressorTarget) -> None:
        self._rotary = target.require_whole_rotary(NAME)

    def score(self, block: BlockView) -> Tensor:
        num_kv_heads, k_KSD = block.k_KSD.shape[0], block.k_KSD.float()
        mean_HD, covariance_HDD = self._future_queries(block)
        mean_KGD = mean_HD.unflatten(0, (num_kv_heads, -1)) * block.scale
        logits_KGS = mean_KGD @ k_KSD.mT
        if covariance_HDD is not None:
            covariance_KGDD = covariance_HDD.unflatten(0, (num_kv_heads, -1)) * block.scale**2
            for logits_KS, one_KDD in zip(
                logits_KGS.unbind(1), covariance_KGDD.unbind(1), strict=True
            ):
                logits_KS += torch.linalg.vecdot(k_KSD @ one_KDD, k_KSD) / 2
        attention_KS = logits_KGS.log_softmax(dim=-1).logsumexp(dim=1)
        norms_KS: Tensor = torch.linalg.vector_norm(block.v_KSD, dim=-1, dtype=torch.float32)
        scores_KS: Tensor = attention_KS + norms_KS.clamp_min(_TINY).log()
        return scores_KS

    def _future_queries(self, block: BlockView) -> tuple[Tensor, Tensor | None]:
        """Mean ``[H, D]`` and covariance ``[H, D, D]`` of queries after the block, after RoPE."""
        assert self._rotary is not None, "expected attention before attach"
        q_HTD = self._typical_queries(block, self._rotary)
        rotation = self._average_rotation(block, self._rotary)
        mean_H1D = q_HTD.mean(dim=1, keepdim=True)
        future_HD = rotation.rotate(mean_H1D)[:, 0]
        if not self._covariance:
            return future_HD, None
        centred_HTD = q_HTD - mean_H1D
        covariance_HDD = centred_HTD.mT @ centred_HTD / q_HTD.shape[1]
        return future_HD, rotation.rotate(rotation.rotate(covariance_HDD).mT)

    def _typical_queries(self, block: BlockView, rotary: Rotary) -> Tensor:
        """Some of the block's queries before RoPE, in fp32, without those of sinks unless there are
        none else.
        """
        num_tokens = block.k_KSD.shape[1]
        outliers = max(0, self._sinks - block.start)
        first = outliers if outliers < num_tokens else 0
        every = -(-(num_tokens - first) // self._rows)
        return block.before_rope(rotary, slice(first, num_tokens, every))[0]

    def _average_rotation(self, block: BlockView, rotary: Rotary) -> Rotation:
        """RoPE, averaged over the positions after the block; no rotation, but linear as one."""
        end = block.start + block.k_KSD.shape[1]
        positions_F = torch.arange(end, end + self._future, device=block.k_KSD.device)
        cos_FD, sin_FD, scaling = rotary.at(positions_F)
        return Rotation(cos_FD.mean(dim=0)[None], sin_FD.mean(dim=0)[None], scaling)


@dataclass(kw_only=True, slots=True)
class ExpectedAttentionConfig(CompressorConfig):
    """Config of `ExpectedAttentionCompressor`.

    Attributes:
        future: positions after the block that queries are expected at.
        sinks: positions at the beginning of a text whose queries are outliers.
        rows: of the block whose queries tell the distribution, at most, evenly spaced.
        covariance: whether the spread of the queries counts or their mean alone.
    """

    future: int = 512
    sinks: int = 4
    rows: int = 1024
    covariance: bool = True

    def __post_init__(self) -> None:
        if self.future < 1:
            raise InputError(f"method.compressor.future={self.future} must be at least 1")
        if self.sinks < 0:
            raise InputError(f"method.compressor.sinks={self.sinks} must not be negative")
        if self.rows < 1:
            raise InputError(f"method.compressor.rows={self.rows} must be at least 1")

    def build(self, *, seed: int) -> ExpectedAttentionCompressor:
        return ExpectedAttentionCompressor(
            future=self.future, sinks=self.sinks, rows=self.rows, covariance=self.covariance
        )
