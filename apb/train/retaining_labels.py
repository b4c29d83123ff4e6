"""What retaining heads learn: how much an answer looks at each token of the document.

Letters: S tokens of the document, T of a part of it, P with the highest labels, A of the answer,
H query heads, K key/value heads, D head dim, C answer tokens at once, G query heads of a group.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.attention.selection import top_tokens

SHARE = 8
"""One token of so many is to be kept: the default `method.passing_len`."""
_ANSWER_ROWS = 64
"""At once: with them the scores of a long document stay below the size of its keys."""
_SMOOTHNESS = 2.5e-3


def answer_scores(q_HAD: Tensor, k_KSD: Tensor, scale: float) -> Tensor:
    """The highest scaled logit that any answer token has for each key, in fp32: ``[K, S]``.

    Locret's causal importance score (arXiv 2410.01805, section 3.3): queries and keys after RoPE,
    no softmax, the maximum over the answer and over the query heads of a group.
    """
    num_kv_heads, num_tokens, _ = k_KSD.shape
    k_KDS = k_KSD.float().mT
    best_KS = k_KDS.new_full((num_kv_heads, num_tokens), float("-inf"))
    for q_HCD in q_HAD.split(_ANSWER_ROWS, dim=1):
        q_KND = q_HCD.float().unflatten(0, (num_kv_heads, -1)).flatten(1, 2)
        torch.maximum(best_KS, (q_KND @ k_KDS).amax(dim=1), out=best_KS)
    return best_KS * scale


class Objective(Enum):
    """What heads are trained for: the labels themselves, or which tokens have the highest."""

    locret = "locret"
    top = "top"

    def wanted(self, labels_KS: Tensor, budget: int) -> Tensor:
        """What the scores of a whole document are compared with, from its labels."""
        if self is Objective.locret:
            return labels_KS
        top_KP = top_tokens(labels_KS, budget)
        return torch.zeros_like(labels_KS).scatter_(1, top_KP, 1.0)

    def loss(self, scores_KT: Tensor, wanted_KT: Tensor, *, num_layers: int) -> Tensor:
        """One layer's part of the loss of the model, which is the sum over the layers."""
        if self is Objective.locret:
            return score_loss(scores_KT, wanted_KT, num_layers=num_layers)
        return F.binary_cross_entropy_with_logits(scores_KT, wanted_KT) / num_layers


def score_loss(scores_KS: Tensor, labels_KS: Tensor, *, num_layers: int) -> Tensor:
    """One layer's part of Locret's loss.

    Smooth-L1 distance, mean over tokens, heads and layers, and the mean squared difference of
    neighbouring scores, summed over the layers with weight 2.5e-3.
    """
    distance = F.smooth_l1_loss(scores_KS, labels_KS)
    return distance / num_layers + _SMOOTHNESS * scores_KS.diff(dim=-1).square().mean()
