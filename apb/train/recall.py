"""How many of the tokens that answers look at a compressor keeps.

Letters: S tokens of the document, K key/value heads, P kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.selection import max_pool, top_tokens
from apb.compress.base import BlockView, Compressor
from apb.train.retaining_labels import SHARE


class Recall(NamedTuple):
    """Of one compressor over held-out documents."""

    per_layer: tuple[float, ...]
    mean: float
    error: float
    """Standard error of the mean over documents."""


class RecallMeter:
    """Compares compressors on the same documents: what share of the true top tokens they keep."""

    def __init__(self, compressors: Mapping[str, Compressor]) -> None:
        self._compressors = compressors
        self._shares: dict[str, list[list[float]]] = {name: [] for name in compressors}

    def observe(self, view: BlockView, labels_KS: Tensor) -> None:
        """One layer of one document; layers come in order."""
        budget = labels_KS.shape[1] // SHARE
        is_wanted_KS = torch.zeros_like(labels_KS).scatter_(1, top_tokens(labels_KS, budget), 1.0)
        for name, compressor in self._compressors.items():
            kept_KP = top_tokens(max_pool(compressor.score(view), compressor.pool), budget)
            shares = self._shares[name]
            if view.layer_idx == 0:
                shares.append([])
            shares[-1].append(is_wanted_KS.gather(1, kept_KP).mean().item())

    def recalls(self) -> dict[str, Recall]:
        """By compressor; the mean is over layers, KV heads and documents."""
        return {name: _recall(torch.tensor(shares)) for name, shares in self._shares.items()}


def _recall(shares_NL: Tensor) -> Recall:
    """Of N documents and L layers."""
    means_N = shares_NL.mean(dim=1)
    error = means_N.std().item() / len(means_N) ** 0.5 if len(means_N) > 1 else 0.0
    return Recall(tuple(shares_NL.mean(dim=0).tolist()), means_N.mean().item(), error)
