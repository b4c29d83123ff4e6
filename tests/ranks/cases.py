"""Building cases and comparing what ranks return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apb.methods.placement import Placement
from apb.prompts.base import PromptTokens
from models import random_ids
from rank_pool import RankPool
from ranks.programs import Case, Outcome, run_cases

WORLD_SIZES = (1, 2, 3, 4)


def make_prompt(context_len: int, *, prefix_len: int = 0, query_len: int = 0) -> PromptTokens:
    """Random tokens, the same for the same lengths."""
    context = random_ids(context_len, seed=context_len)
    query = random_ids(query_len, seed=1000 + query_len)
    return PromptTokens(context[:prefix_len], context[prefix_len:], query)


def outcomes(pool: RankPool, cases: Sequence[Case]) -> Iterator[tuple[Case, list[Outcome]]]:
    """Per case, the outcome of every rank."""
    by_rank = pool.run(run_cases, cases)
    return zip(cases, map(list, zip(*by_rank, strict=True)), strict=True)


def logits(pool: RankPool, cases: Sequence[Case]) -> list[Tensor]:
    """Each case's logits, which are the same on every rank that decodes, bit for bit."""
    result = []
    for case, ranks in outcomes(pool, cases):
        for rank in ranks[1:]:
            if case.placement is Placement.rank0:
                assert rank.logits_TV.numel() == 0, case
                continue
            assert torch.equal(rank.logits_TV, ranks[0].logits_TV), case
        result.append(ranks[0].logits_TV)
    return result


def in_order(ranks: Sequence[Outcome]) -> tuple[list[int], Tensor]:
    """Cached positions and KV of all ranks, sorted by position."""
    positions_S = torch.cat([rank.positions_S for rank in ranks])
    kv_L2KSD = torch.cat([rank.kv_L2KSD for rank in ranks], dim=3)
    order = positions_S.argsort()
    return positions_S[order].tolist(), kv_L2KSD[:, :, :, order]


def max_diff(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two finite tensors of one shape."""
    assert a.shape == b.shape
    assert a.isfinite().all()
    assert b.isfinite().all()
    return float((a - b).abs().max())
