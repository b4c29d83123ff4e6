"""The specification of selection: pooled scores, the best tokens per head, gathered to send."""

from __future__ import annotations

import torch
from torch import Tensor


def top_tokens(scores_KS: Tensor, budget: int) -> Tensor:
    """Positions of each head's highest scores, ascending: ``[K, P]``. Of equals, the earliest.

    Pooled scores are often equal, and `topk` leaves open which of them it returns.
    """
    order_KS = scores_KS.sort(dim=-1, descending=True, stable=True).indices
    return order_KS[:, :budget].sort(dim=-1).values


def max_pool(scores_KS: Tensor, pool: int) -> Tensor:
    """Each token takes the best score of its neighbourhood, so that phrases are kept whole."""
    if pool == 1:
        return scores_KS
    return torch.nn.functional.max_pool1d(scores_KS, pool, stride=1, padding=pool // 2)


def select_topk(
    scores_KS: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    out_P2KD: Tensor,
    *,
    pool: int,
    excluded: int,
) -> Tensor:
    """Keep, per head, the P tokens whose pooled scores are highest; write their KV to `out_P2KD`.

    Args:
        out_P2KD: a part of the message, in the dtype of the wire.
        pool: a token takes the best score among this many around it; odd.
        excluded: that many tokens at the beginning are not kept; their scores are pooled.

    Returns:
        Positions of the kept tokens, ascending: ``[K, P]``.
    """
    index_KP = top_tokens(max_pool(scores_KS, pool)[:, excluded:], out_P2KD.shape[0]) + excluded
    index_KPD = index_KP[..., None].expand(-1, -1, k_KSD.shape[-1])
    for place, x_KSD in enumerate((k_KSD, v_KSD)):
        out_P2KD[:, place] = x_KSD.gather(1, index_KPD).transpose(0, 1)
    return index_KP
