"""Trees of drafted tokens, and what attention and verification need to know of them.

Letters: N nodes, C tokens that a child is drawn from, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count, repeat
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


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """What the children of one node were drawn from, and what was drawn.

    Attributes:
        kind: how they were drawn.
        probs_C: the very distribution of a draw, fp32, after temperature and whatever was cut off.
        drawn: target ids in the order in which they were drawn, repeated ones included.
        token_ids_C: which target ids the probabilities belong to; None is the whole vocabulary.
    """

    kind: ProposalKind
    probs_C: Tensor
    drawn: tuple[int, ...]
    token_ids_C: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.kind is not ProposalKind.onehot, "children by no chance have no distribution"
        assert abs(float(self.probs_C.sum()) - 1.0) < 1e-3, "probabilities that do not sum to 1"
        distinct = self.kind is ProposalKind.without_replacement
        assert not distinct or len(set(self.drawn)) == len(self.drawn), "drawn twice"

    def dense(self, vocab_size: int) -> Tensor:
        """The distribution over the whole vocabulary, in fp64 on the CPU, normalised."""
        probs_C = self.probs_C.detach().to("cpu", torch.float64)
        if self.token_ids_C is None:
            return probs_C / probs_C.sum()
        probs_V = probs_C.new_zeros(vocab_size)
        return probs_V.index_add_(0, self.token_ids_C.cpu(), probs_C / probs_C.sum())

    def first(self, count: int) -> Proposal:
        """As if only so many had been drawn."""
        return replace(self, drawn=self.drawn[:count])


class Claim(NamedTuple):
    """What a drafter thinks of a node."""

    share: float = 1.0
    """How likely the token is where the one before it is accepted."""
    kind: int = 0
    """Tells evidence of different quality apart, such as short matches from long ones."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafted tokens in topological order. Node 0, the root, is the last token of the answer so
    far, which the target has not read yet.

    Attributes:
        tokens: target ids.
        parents: of each node, an earlier one; -1 for the root.
        sources: which drafter each node comes from; 0 for the root.
        proposals: by node, what its children were drawn from; a node that is missing has children
            chosen without chance, or none. Only the owner knows them.
        claims: of each node; the root's says nothing. Only the owner knows them.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[int, ...]
    proposals: Mapping[int, Proposal] = field(default_factory=dict, compare=False)
    claims: tuple[Claim, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.parents) == len(self.sources) > 0
        assert self.parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(self.parents) if node)
        for node, proposal in self.proposals.items():
            drawn = {self.tokens[child] for child in self.children(node)}
            assert drawn == set(proposal.drawn), "a node has drawn children or others, never both"

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

    def part(self, nodes: Sequence[int]) -> DraftTree:
        """Some nodes, ascending, with all their ancestors among them; no drawn one may be lost."""
        place = {node: idx for idx, node in enumerate(nodes)}
        return DraftTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(place[self.parents[node]] if node else -1 for node in nodes),
            tuple(self.sources[node] for node in nodes),
            {place[node]: drawn for node, drawn in self.proposals.items() if node in place},
            tuple(self.claims[node] for node in nodes),
        )

    def visible(self) -> Tensor:
        """Whether a node sees another, which its ancestors and itself are: bool ``[N, N]``."""
        visible_NN = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            visible_NN[node] |= visible_NN[parent]
        return visible_NN


S = TypeVar("S")

_NO_CLAIM = Claim()


class Follower(NamedTuple, Generic[S]):
    """A token that may come next, how likely that is taken to be, and what is known behind it."""

    token_id: int
    share: float
    state: S
    kind: int = 0


class TreeBuilder:
    """Grows a tree under a budget of nodes. What several drafters propose is kept once."""

    def __init__(self, root: int, *, max_nodes: int) -> None:
        """`max_nodes` counts the root."""
        self._max_nodes = max_nodes
        self._tokens, self._parents, self._sources = [root], [-1], [0]
        self._children: dict[tuple[int, int], int] = {}
        self._proposals: dict[int, Proposal] = {}
        self._claims = [Claim()]

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
    def outlook(self) -> float:
        """Drafted tokens that will be accepted, if all claims are right."""
        chances = [1.0]
        for parent, claim in zip(self._parents[1:], self._claims[1:], strict=True):
            chances.append(chances[parent] * claim.share)
        return sum(chances[1:])

    @property
    def is_full(self) -> bool:
        return self.room <= 0

    def allow(self, more: int) -> None:
        """Take in so many nodes beyond those that are there, for the next drafter to add."""
        self._max_nodes = len(self) + more

    def add(
        self, parent: int, token_id: int, *, source: int, claim: Claim = _NO_CLAIM
    ) -> int | None:
        """The child of a node with that token, new or known; of two claims the higher one counts.

        None where the tree is full, or where the node has drawn children: the test that those have
        to pass is exact only as long as nobody adds to them.
        """
        known = self._children.get((parent, token_id))
        if known is not None:
            if claim.share > self._claims[known].share:
                self._claims[known], self._sources[known] = claim, source
            return known
        if self.is_full or parent in self._proposals:
            return None
        return self._append(parent, token_id, source, claim)

    def add_drawn(self, parent: int, proposal: Proposal, *, source: int) -> list[int]:
        """The children of a node that were drawn, in order, each token once.

        How many are drawn must be decided before the first of them is; `room` tells how many there
        is room for. Draws beyond that are dropped, whatever they hold, which is exact. A node that
        had children already gets none, unless these are the same draws and more: then it gets the
        further ones.
        """
        known = self._proposals.get(parent)
        if known is None and parent in self._parents:
            return []
        num_known = 0 if known is None else len(known.drawn)
        kept = proposal.first(num_known + self.room)
        assert known is None or known.drawn == kept.drawn[:num_known], "drawn once more"
        for token_id in kept.drawn[num_known:]:
            if (parent, token_id) not in self._children:
                self._append(parent, token_id, source)
        if kept.drawn:
            self._proposals[parent] = kept
        return [self._children[parent, token_id] for token_id in dict.fromkeys(kept.drawn)]

    def _append(self, parent: int, token_id: int, source: int, claim: Claim = _NO_CLAIM) -> int:
        node = self._children[parent, token_id] = len(self)
        self._tokens.append(token_id)
        self._parents.append(parent)
        self._sources.append(source)
        self._claims.append(claim)
        return node

    def add_path(
        self, token_ids: Sequence[int], *, source: int, claims: Iterable[Claim] = repeat(_NO_CLAIM)
    ) -> None:
        """Tokens that follow each other from the root on, as far as the budget goes."""
        node = 0
        for token_id, claim in zip(token_ids, claims, strict=False):
            added = self.add(node, token_id, source=source, claim=claim)
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
            claim = Claim(follower.share, follower.kind)
            node = self.add(parent, follower.token_id, source=source, claim=claim)
            if node is not None:
                consider(node, -score, follower.state)
            elif self.is_full:
                return

    def build(self) -> DraftTree:
        tokens, parents, sources = map(tuple, (self._tokens, self._parents, self._sources))
        return DraftTree(tokens, parents, sources, dict(self._proposals), tuple(self._claims))
