"""Several compressors in one, by the ranks that they give to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apb.attention.selection import max_pool
from apb.compress.base import BlockView, Compressor, CompressorConfig, CompressorTarget
from apb.compress.table import COMPRESSORS
from apb.errors import InputError


class FusionCompressor(Compressor):
    """Keeps the tokens that rank high with several compressors, however these scale their scores.

    Reciprocal rank fusion (Cormack et al. 2009, https://doi.org/10.1145/1571941.1572114): a token
    scores the sum of ``weight / (constant + rank)``, ranked from 1 within its block and KV head
    after each member's own pooling; of equal ones the earliest ranks first.
    """

    def __init__(
        self, members: Sequence[Compressor], weights: Sequence[float], *, constant: float
    ) -> None:
        self._members, self._weights, self._constant = tuple(members), tuple(weights), constant
        self.needs_query = any(member.needs_query for member in members)

    def attach(self, target: CompressorTarget) -> None:
        for member in self._members:
            member.attach(target)

    def score(self, block: BlockView) -> Tensor:
        num_heads, num_tokens, _ = block.k_KSD.shape
        rank_S = torch.arange(1, num_tokens + 1, device=block.k_KSD.device)
        shares_S = 1 / (self._constant + rank_S)
        fused_KS = block.k_KSD.new_zeros((num_heads, num_tokens), dtype=torch.float32)
        for member, weight in zip(self._members, self._weights, strict=True):
            scores_KS = max_pool(member.score(block), member.pool)
            order_KS = scores_KS.argsort(dim=-1, descending=True, stable=True)
            fused_KS.scatter_add_(-1, order_KS, (weight * shares_S).expand(num_heads, -1))
        return fused_KS


@dataclass(kw_only=True, slots=True)
class FusionConfig(CompressorConfig):
    """Config of `FusionCompressor`.

    Attributes:
        members: names of compressors, each with its default settings.
        weights: of the members, in their order; none is all the same.
        constant: the greater, the less first ranks stand out.
    """

    members: list[str] = field(default_factory=lambda: ["window", "expected_attention"])
    weights: list[float] = field(default_factory=list)
    constant: float = 60.0

    def __post_init__(self) -> None:
        for name in self.members:
            if name not in COMPRESSORS:
                raise InputError(
                    f"method.compressor.members has {name!r}, which is none of "
                    f"{', '.join(COMPRESSORS)}"
                )
        if len(self.members) < 2 or len(set(self.members)) < len(self.members):
            raise InputError(
                f"method.compressor.members={_listed(self.members)} must be two or more "
                "compressors, each once"
            )
        if self.weights and len(self.weights) != len(self.members):
            raise InputError(
                f"method.compressor.weights={_listed(self.weights)} must be one for each of "
                f"{len(self.members)} members, or none"
            )
        if not all(weight > 0 for weight in self.weights):
            raise InputError(f"method.compressor.weights={_listed(self.weights)} must be above 0")
        if self.constant < 0:
            raise InputError(f"method.compressor.constant={self.constant} must not be negative")

    def build(self, *, seed: int) -> FusionCompressor:
        members = [COMPRESSORS[name]().build(seed=seed) for name in self.members]
        return FusionCompressor(
            members, self.weights or [1.0] * len(members), constant=self.constant
        )


def _listed(values: Sequence[object]) -> str:
    return f"[{','.join(map(str, values))}]"
