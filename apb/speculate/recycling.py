"""Drafts from the target's own leftovers: what else it found likely after each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.tree import Follower, TreeBuilder

_BEST, _DECAY = 0.6, 0.35
"""How likely a token's best follower is taken to be, and by what factor each further one is less
likely than the one before it.
"""


class RecyclingDrafter(Drafter):
    """Token Recycling (Luo et al. 2024, https://arxiv.org/abs/2408.08696).

    After each step the likeliest followers of every node's token replace those remembered for that
    token, also for later requests. A draft walks over what is remembered, best first by rank
    instead of the paper's fixed tree. Until the target has said something of a token, its followers
    in the prompt stand in.
    """

    def __init__(self, *, width: int) -> None:
        self._width = width
        self._told: dict[int, list[int]] = {}
        self._in_prompt: dict[int, list[int]] = {}
        self._last = 0

    def begin(self, request: DraftRequest) -> None:
        self._in_prompt = {}
        for follower, token_id in pairwise(reversed(request.prompt_ids)):  # the latest count most
            known = self._in_prompt.setdefault(token_id, [])
            if len(known) < self._width and follower not in known:
                known.append(follower)

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._last = new_ids[-1]
        if verified is None:
            return
        width = min(self._width, verified.logits_NV.shape[1])
        best_NK = verified.logits_NV.topk(width, dim=-1).indices.tolist()
        for token_id, best in zip(verified.tree.tokens, best_NK, strict=True):
            self._told[token_id] = best

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        tree.add_likeliest(self._last, self._ranked, source=source)

    def _ranked(self, token_id: int) -> Iterator[Follower[int]]:
        told = self._told.get(token_id)
        known = self._in_prompt.get(token_id, ()) if told is None else told
        for rank, follower in enumerate(known):
            share = _BEST * _DECAY**rank
            kind = rank if told is None else self._width + rank
            yield Follower(follower, share, follower, kind)


@dataclass(kw_only=True, slots=True)
class RecyclingConfig(DrafterConfig):
    """Config of `RecyclingDrafter`.

    Attributes:
        width: followers remembered for each token.
    """

    width: int = 8

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        if self.width < 1:
            raise InputError(f"drafter.width={self.width} must be at least 1")

    def build_drafter(self, target: DraftTarget) -> RecyclingDrafter:
        return RecyclingDrafter(width=self.width)
