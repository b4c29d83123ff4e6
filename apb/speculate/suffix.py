"""Drafts from the document: what followed where it continued like the answer does now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.lookup import claim_of_match, claims_of_copy, latest_recurrence
from apb.speculate.suffix_index import (
    MAX_MATCH,
    SORTED_TOKENS,
    Match,
    SuffixIndex,
    decode,
    encode,
)
from apb.speculate.tree import Follower, TreeBuilder


class SuffixDrafter(Drafter):
    """Continues the longest recent match in the prompt, by the most frequent continuations.

    As in SuffixDecoding (Oliaro et al. 2024, https://arxiv.org/abs/2411.04975): a branch's score is
    the share of places that continue so, and the draft reaches no further than a few times the
    match's length, because short matches are chance. The answer itself is searched as well, for its
    latest place only.
    """

    def __init__(self, *, min_match: int, factor: float) -> None:
        self._min_match, self._factor = min_match, factor
        self._index: SuffixIndex | None = None
        self._recent: list[int] = []
        self._answer = bytearray()

    def begin(self, request: DraftRequest) -> None:
        self._index = SuffixIndex(request.prompt_ids)
        self._recent = list(request.prompt_ids[-MAX_MATCH:])
        self._answer = bytearray()

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._recent.extend(new_ids)
        del self._recent[:-MAX_MATCH]
        self._answer += encode(new_ids)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        assert self._index is not None, "extend_tree before begin"
        match = self._index.longest_match(self._recent, at_least=self._min_match)
        own = latest_recurrence(self._answer, at_least=self._min_match, at_most=MAX_MATCH)
        if own is not None and (match is None or own.length >= match.length):
            copied = decode(self._answer, own.stop, own.stop + self._reach(own.length))
            tree.add_path(copied, source=source, claims=claims_of_copy(own.length))
        if match is not None:
            farthest = min(match.length + self._reach(match.length), SORTED_TOKENS)
            tree.add_likeliest(match, lambda place: self._followers(place, farthest), source=source)

    def _reach(self, match_len: int) -> int:
        return max(1, round(self._factor * match_len))

    def _followers(self, place: Match, farthest: int) -> Iterator[Follower[Match]]:
        """The tokens behind a place, by how many of its occurrences go on so."""
        assert self._index is not None
        if place.length < farthest:
            children = self._index.continuations(place)
            total = sum(child.last - child.first for _, child in children)
            for token_id, child in children:
                claim = claim_of_match(place.length, (child.last - child.first) / total)
                yield Follower(token_id, claim.share, child, claim.kind)


@dataclass(kw_only=True, slots=True)
class SuffixConfig(DrafterConfig):
    """Config of `SuffixDrafter`.

    Attributes:
        min_match: shortest match that is continued.
        factor: tokens drafted at most, per token of the match.
    """

    min_match: int = 2
    factor: float = 2.0

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        if self.min_match < 1:
            raise InputError(f"drafter.min_match={self.min_match} must be at least 1")
        if not self.factor > 0:
            raise InputError(f"drafter.factor={self.factor} must be above 0")

    def build_drafter(self, target: DraftTarget) -> SuffixDrafter:
        return SuffixDrafter(min_match=self.min_match, factor=self.factor)
