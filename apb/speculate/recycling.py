"""Drafts from the target's own leftovers: what else it found likely after each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.tree import Follower, TreeBuilder

Place = tuple[int, ...]
"""The last token, or the last two."""

_BEST, _DECAY = 0.6, 0.35
"""How likely a token's best follower is taken to be, and by what factor each further one is less
likely than the one before it.
"""


class RecyclingDrafter(Drafter):
    """Token Recycling (Luo et al. 2024, https://arxiv.org/abs/2408.08696).

    After each step the likeliest followers of every node's token replace those remembered for that
    token, also for later requests. A draft walks over what is remembered, best first by rank
    instead of the paper's fixed tree. Two more kinds of memory beside the paper's: followers of two
    tokens in a row, which are asked first, and those in the prompt, until the target has said
    something of a token.
    """

    def __init__(self, *, width: int) -> None:
        self._width = width
        self._told: dict[Place, Sequence[int]] = {}
        self._in_prompt: dict[Place, list[int]] = {}
        self._last: Place = ()

    def begin(self, request: DraftRequest) -> None:
        self._in_prompt = {}
        for follower, token_id in pairwise(reversed(request.prompt_ids)):  # the latest count most
            known = self._in_prompt.setdefault((token_id,), [])
            if len(known) < self._width and follower not in known:
                known.append(follower)
        self._last = tuple(request.prompt_ids[-2:])

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        root, self._last = self._last, (*self._last, *new_ids)[-2:]
        if verified is None:
            return
        width = min(self._width, verified.logits_NV.shape[1])
        best_NK = verified.logits_NV.topk(width, dim=-1).indices.tolist()
        places: list[Place] = [(*root[:-1], verified.tree.tokens[0])]
        for token_id, parent in zip(
            verified.tree.tokens[1:], verified.tree.parents[1:], strict=True
        ):
            places.append((*places[parent][-1:], token_id))
        for place, best in zip(places, best_NK, strict=True):
            self._told[place] = self._told[place[-1:]] = best

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        tree.add_likeliest(self._last, self._ranked, source=source)

    def _ranked(self, place: Place) -> Iterator[Follower[Place]]:
        """What followed both tokens first, then what followed the last one."""
        told = [self._told.get(place, ()), self._told.get(place[-1:], ())]
        memories = told if any(told) else [self._in_prompt.get(place[-1:], ())]
        seen = set[int]()
        for memory, followers in enumerate(memories):
            for rank, follower in enumerate(followers):
                if follower not in seen and len(seen) < self._width:
                    share = _BEST * _DECAY ** len(seen)
                    seen.add(follower)
                    kind = self._width * (memory + 2 * (len(memories) - 1)) + rank
                    yield Follower(follower, share, (*place[-1:], follower), kind)


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
