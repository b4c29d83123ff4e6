"""What an EAGLE draft looks at: likely tokens level by level, the best of which make up a tree.

Letters: M hidden size, W nodes of a level, N drafted rows, X nodes that were looked at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from apb.speculate.tree import Claim, TreeBuilder


class Level(NamedTuple):
    """Nodes of one depth whose children are looked at next, the likeliest first."""

    ids_W: Tensor
    scores_W: Tensor
    """Log-probabilities of their paths."""
    nodes_W: Tensor
    """Their numbers among all that were considered."""
    states_WM: Tensor
    """The head's, of the tokens before them."""
    visible_WN: Tensor
    """Which drafted rows they see, themselves the last."""


class Considered:
    """All nodes that a draft has looked at, in order of depth."""

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._size = 0

    def add(self, ids_X: Tensor, scores_X: Tensor, parents_X: Tensor) -> Tensor:
        """Their numbers; -1 is the root's."""
        self._ids.append(ids_X)
        self._scores.append(scores_X)
        self._parents.append(parents_X)
        start, self._size = self._size, self._size + len(ids_X)
        return torch.arange(start, self._size, device=ids_X.device)

    def score_of(self, rank: int) -> float:
        """The score that so many nodes reach; minus infinity where there are fewer."""
        if rank > self._size:
            return -math.inf
        return float(torch.cat(self._scores).topk(rank).values[-1])

    def add_to(self, tree: TreeBuilder, *, source: int) -> None:
        """The likeliest until the tree is full, apart from what is below nodes closed to them.

        No child is likelier than its parent, and of equals the parent is first: it was considered
        earlier.
        """
        scores_X, order_X = torch.cat(self._scores).sort(descending=True, stable=True)
        ids, parents = torch.cat(self._ids).tolist(), torch.cat(self._parents).tolist()
        nodes: dict[int, int | None] = {-1: 0}
        score_of = {-1: 0.0}
        for score, number in zip(scores_X.tolist(), order_X.tolist(), strict=True):
            if tree.is_full:
                return
            before = parents[number]
            parent, score_of[number] = nodes[before], score
            if parent is None:
                nodes[number] = None
                continue
            claim = Claim(math.exp(score - score_of[before]))
            nodes[number] = tree.add(parent, ids[number], source=source, claim=claim)
