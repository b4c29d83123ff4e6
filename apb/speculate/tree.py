"""Trees of drafted tokens, and what attention needs to know of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor


class ProposalKind(Enum):
    """How the children of a node were chosen, which decides what verifier is exact for them.

    `onehot`: by anything but chance of this step. `iid`: drawn with replacement from a known
    distribution. `without_replacement`: drawn from it, renormalised after each draw.
    """

    onehot = "onehot"
    iid = "iid"
    without_replacement = "without_replacement"


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafted tokens in topological order. Node 0, the root, is the last token of the answer so
    far, which the target has not read yet.

    Attributes:
        tokens: target ids.
        parents: of each node, an earlier one; -1 for the root.
        sources: which drafter each node comes from; 0 for the root.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.parents) == len(self.sources) > 0
        assert self.parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(self.parents) if node)

    @classmethod
    def of_root(cls, token_id: int) -> DraftTree:
        """No draft: the target reads one token, as in plain decoding."""
        return cls((token_id,), (-1,), (0,))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> tuple[int, ...]:
        """Tokens between the root and each node; a node's position is the root's plus its depth."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def is_chain(self) -> bool:
        """Whether every node follows the one before it, so that visibility is plain causal."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def children(self, node: int) -> Iterator[int]:
        """In the order in which they were proposed."""
        return (child for child in range(node + 1, len(self)) if self.parents[child] == node)

    def visible(self) -> Tensor:
        """Whether a node sees another, which its ancestors and itself are: bool ``[N, N]``."""
        visible_NN = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            visible_NN[node] |= visible_NN[parent]
        return visible_NN


S = TypeVar("S")


class Follower(NamedTuple, Generic[S]):
    """A token that may come next, how likely that is taken to be, and what is known behind it."""

    token_id: int
    share: float
    state: S


class TreeBuilder:
    """Grows a tree under a budget of nodes. What several drafters propose is kept once."""

    def __init__(self, root: int, *, max_nodes: int, min_score: float = 0.0) -> None:
        """`max_nodes` counts the root.

        Drafters that know how likely a path is leave out those below `min_score`.
        """
        self._max_nodes = max_nodes
        self.min_score = min_score
        self._tokens, self._parents, self._sources = [root], [-1], [0]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def root(self) -> int:
        """The token that the tree grows from."""
        return self._tokens[0]

    @property
    def room(self) -> int:
        """Nodes that may still be added."""
        return self._max_nodes - len(self)

    @property
    def is_full(self) -> bool:
        return self.room <= 0

    def add(self, parent: int, token_id: int, *, source: int) -> int | None:
        """The child of a node with that token, new or known; None where the tree is full."""
        known = self._children.get((parent, token_id))
        if known is not None:
            return known
        if self.is_full:
            return None
        node = self._children[parent, token_id] = len(self)
        self._tokens.append(token_id)
        self._parents.append(parent)
        self._sources.append(source)
        return node

    def add_path(self, token_ids: Sequence[int], *, source: int) -> None:
        """Tokens that follow each other from the root on, as far as the budget goes."""
        node = 0
        for token_id in token_ids:
            added = self.add(node, token_id, source=source)
            if added is None:
                return
            node = added

    def add_likeliest(
        self, start: S, followers: Callable[[S], Iterable[Follower[S]]], *, source: int
    ) -> None:
        """Grow from the root, best first, until the tree is full or nothing follows.

        A node's score is the product of the shares on its path, so that parents come before
        children; of equal scores, the first found comes first.
        """
        order = count()
        queue: list[tuple[float, int, int, Follower[S]]] = []

        def consider(node: int, score: float, state: S) -> None:
            for follower in followers(state):
                entry = (-score * follower.share, next(order), node, follower)
                heapq.heappush(queue, entry)

        consider(0, 1.0, start)
        while queue:
            score, _, parent, follower = heapq.heappop(queue)
            if -score < self.min_score:
                return
            node = self.add(parent, follower.token_id, source=source)
            if node is None:
                return
            consider(node, -score, follower.state)

    def build(self) -> DraftTree:
        return DraftTree(tuple(self._tokens), tuple(self._parents), tuple(self._sources))
