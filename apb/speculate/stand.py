"""Drafts drawn from what the target found likely after the same few tokens before.

Letters: N nodes of a tree, V vocabulary, K tokens remembered behind an n-gram.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apb.errors import InputError
from apb.sampling import SamplingParams, new_generator, nucleus, tempered
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.tree import Follower, Proposal, ProposalKind, TreeBuilder
from apb.speculate.verify import build_verifier

Ngram = tuple[int, ...]
Slot = tuple[int, ...]
"""A place in a tree: at each depth, which of the draws to follow."""

_FIRST, _DECAY = 0.6, 0.35
"""How likely a node's first draw is taken to be accepted, and by what factor each further one is
less likely than the one before it.
"""
_NEVER = 1e-6
"""Tokens no likelier than this are not remembered."""


@dataclass(slots=True)
class Followers:
    """What follows an n-gram: the mean of the target's distributions there, its largest part."""

    count: int = 0
    probs: dict[int, float] = field(default_factory=dict)

    def add(self, probs: dict[int, float], *, width: int) -> None:
        """One more distribution: after k of them, what is known keeps the weight k / (k + 1)."""
        self.count += 1
        merged = {}
        for token_id in {**self.probs, **probs}:
            known, new = self.probs.get(token_id, 0.0), probs.get(token_id, 0.0)
            merged[token_id] = known + (new - known) / self.count
        best = heapq.nlargest(width, merged.items(), key=lambda item: item[1])
        self.probs = {token_id: prob for token_id, prob in best if prob > _NEVER}


class StandDrafter(Drafter):
    """STAND (Song et al. 2025, https://arxiv.org/abs/2506.04708): n-grams that remember the
    target's probabilities, from which drafts are drawn without replacement.

    Learned from every node of every verified tree, also from rejected ones; the longest known
    n-gram counts. Where tokens are drawn, the tree's shape is fixed first by the budget alone, best
    first by what draws are usually worth instead of the paper's fit to data, and draws are fresh
    for every node instead of cached, so that a verifier may rely on them. Where the answer is
    greedy, the likeliest paths are proposed.
    """

    proposes = frozenset({ProposalKind.onehot, ProposalKind.without_replacement})

    def __init__(self, *, width: int, max_order: int) -> None:
        self._width, self._max_order = width, max_order
        self._known: dict[Ngram, Followers] = {}
        self._recent: Ngram = ()
        self._sampling = SamplingParams()
        self._generator = torch.Generator()

    def begin(self, request: DraftRequest) -> None:
        self._known = {}
        self._recent = tuple(request.prompt_ids[-self._max_order :])
        self._sampling = request.sampling
        self._generator = new_generator(request.sampling.seed, stream="stand")

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        if verified is not None:
            self._learn(verified)
        self._recent = (*self._recent, *new_ids)[-self._max_order :]

    def _learn(self, verified: Verified) -> None:
        tree, contexts = verified.tree, [self._recent]
        for token_id, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
            contexts.append(self._after(contexts[parent], token_id))
        likeliest = _likeliest(verified.logits_NV, self._width, self._sampling)
        for context, probs in zip(contexts, likeliest, strict=True):
            for order in range(1, len(context) + 1):
                followers = self._known.setdefault(context[-order:], Followers())
                followers.add(probs, width=self._width)

    def _after(self, context: Ngram, token_id: int) -> Ngram:
        return (*context, token_id)[-self._max_order :]

    def followers(self, context: Ngram) -> dict[int, float]:
        """Probabilities of the tokens remembered behind the longest known end of a context."""
        for order in range(len(context), 0, -1):
            known = self._known.get(context[-order:])
            if known is not None:
                return known.probs
        return {}

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        if self._sampling.temperature == 0.0:
            tree.add_likeliest(self._recent, self._ranked, source=source)
        else:
            self._draw_tree(tree, source)

    def _ranked(self, context: Ngram) -> Iterator[Follower[Ngram]]:
        for token_id, prob in self.followers(context).items():
            yield Follower(token_id, prob, self._after(context, token_id), kind=len(context))

    def _draw_tree(self, tree: TreeBuilder, source: int) -> None:
        """One more draw at a node for each slot; a smaller budget gives the same tree cut short.

        Slots behind an unknown n-gram stay empty: how many draws a node gets must not depend on
        what was drawn there.
        """
        places: dict[Slot, tuple[int, Ngram]] = {(): (0, self._recent)}
        proposals: dict[Slot, Proposal | None] = {}
        for slot in best_slots(tree.room, width=self._width):
            above, rank = slot[:-1], slot[-1]
            if above not in places:
                continue
            node, context = places[above]
            if rank == 0:
                proposals[above] = self._draw(context)
            proposal = proposals[above]
            if proposal is None or rank >= len(proposal.drawn):
                continue
            children = tree.add_drawn(node, proposal.first(rank + 1), source=source)
            if rank < len(children):
                places[slot] = children[rank], self._after(context, proposal.drawn[rank])

    def _draw(self, context: Ngram) -> Proposal | None:
        followers = self.followers(context)
        if not followers:
            return None
        probs_K = torch.tensor(list(followers.values()), dtype=torch.float32)
        probs_K = probs_K / probs_K.sum()
        ids_K = torch.tensor(list(followers))
        drawn = tuple(ids_K[self.draw_order(probs_K)].tolist())
        return Proposal(ProposalKind.without_replacement, probs_K, drawn, ids_K)

    def draw_order(self, probs_K: Tensor) -> list[int]:
        """Indices in the order of draws without replacement, by the Gumbel-top-k trick."""
        exponential_K = torch.empty(len(probs_K), dtype=torch.float64)
        gumbel_K = -exponential_K.exponential_(generator=self._generator).log()
        order: list[int] = (probs_K.double().log() + gumbel_K).argsort(descending=True).tolist()
        return order


def best_slots(count: int, *, width: int) -> Iterator[Slot]:
    """The places of a tree's nodes but its root, best first, parents and earlier draws before."""
    queue: list[tuple[float, Slot]] = [(-_FIRST, (0,))]
    for _ in range(count):
        if not queue:
            return
        score, slot = heapq.heappop(queue)
        yield slot
        heapq.heappush(queue, (score * _FIRST, (*slot, 0)))
        if slot[-1] + 1 < width:
            heapq.heappush(queue, (score * _DECAY, (*slot[:-1], slot[-1] + 1)))


def _likeliest(
    logits_NV: Tensor, width: int, sampling: SamplingParams
) -> Iterator[dict[int, float]]:
    """The target's largest probabilities at each node, about as the sampler sees them.

    Top-k and top-p look at no more than these tokens here, since a draft need not be exact.
    """
    scaled_NV = tempered(logits_NV, sampling.temperature or 1.0)
    best_NK = scaled_NV.topk(min(width, scaled_NV.shape[1]), dim=-1)
    probs_NK = (best_NK.values - scaled_NV.logsumexp(dim=-1, keepdim=True)).exp()
    probs_NK = nucleus(probs_NK, sampling.top_p)
    if sampling.top_k:
        probs_NK[:, sampling.top_k :] = 0.0
    for token_ids, probs in zip(best_NK.indices.tolist(), probs_NK.tolist(), strict=True):
        yield dict(zip(token_ids, probs, strict=True))


@dataclass(kw_only=True, slots=True)
class StandConfig(DrafterConfig):
    """Config of `StandDrafter`.

    Attributes:
        width: tokens remembered behind each n-gram.
        max_order: length of the longest n-gram.
    """

    width: int = 10
    max_order: int = 3

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        for name in ("width", "max_order"):
            if getattr(self, name) < 1:
                raise InputError(f"drafter.{name}={getattr(self, name)} must be at least 1")
        build_verifier(self.verifier, StandDrafter.proposes)

    def build_drafter(self, target: DraftTarget) -> StandDrafter:
        return StandDrafter(width=self.width, max_order=self.max_order)
