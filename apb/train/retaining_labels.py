"""What retaining heads learn: how much an answer looks at each token of the document.

Letters: S tokens of the document, A of the answer, H query heads, K key/value heads, D head dim,
C answer tokens at once, G query heads of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def score_loss(scores_KS: Tensor, labels_KS: Tensor, *, num_layers: int) -> Tensor:
    """One layer's part of Locret's loss, whose sum over the layers is the loss of the model.

    Smooth-L1 distance, mean over tokens, heads and layers, and the mean squared difference of
    neighbouring scores, summed over the layers with weight 2.5e-3.
    """
    distance = F.smooth_l1_loss(scores_KS, labels_KS)
    return distance / num_layers + _SMOOTHNESS * scores_KS.diff(dim=-1).square().mean()
