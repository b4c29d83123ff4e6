"""Drafts made of phrases: what the target has written, and what it would have written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.recycling import RecyclingDrafter
from apb.speculate.tree import Claim, DraftTree, TreeBuilder

Phrase = tuple[int, ...]

_BEGINS, _GOES_ON = 0.4, 0.7
"""How likely the newest phrase is taken to follow a token, and its tokens to follow each other."""


class PhrasePool:
    """For each token the phrases that followed it, the newest first, up to `capacity` of them.

    A phrase that begins like a known one counts as that one; a longer one takes its place.
    """

    def __init__(self, *, capacity: int, length: int) -> None:
        self._capacity, self._length = capacity, length
        self._phrases: dict[int, list[Phrase]] = {}

    def add(self, token_id: int, phrase: Sequence[int]) -> None:
        """The newest phrase behind a token, of which `length` tokens are kept."""
        new = tuple(phrase[: self._length])
        if not new:
            return
        known = self._phrases.setdefault(token_id, [])
        whole = next((old for old in known if old[: len(new)] == new), new)
        others = [old for old in known if whole[: len(old)] != old]
        self._phrases[token_id] = [whole, *others][: self._capacity]

    def add_text(self, text: Sequence[int]) -> None:
        """All phrases of a text that is new, its latest as the newest."""
        for place in reversed(range(len(text) - 1)):  # so that only what stays is looked at
            known = self._phrases.setdefault(text[place], [])
            if len(known) < self._capacity:
                phrase = tuple(text[place + 1 : place + 1 + self._length])
                if phrase not in known:
                    known.append(phrase)

    def behind(self, token_id: int) -> Sequence[Phrase]:
        """The newest first."""
        return self._phrases.get(token_id, ())


class OuroborosDrafter(Drafter):
    """Ouroboros (Zhao et al. 2024, https://arxiv.org/abs/2402.13720), without its draft model.

    A draft is the newest phrases behind the last token, with recycled tokens beside them, and is
    lengthened by phrases behind its deepest node. Phrases are what was written, and what comes out
    of verification: where the target agrees with a draft, accepted or not, its tokens are one.
    Those of the prompt come last.
    """

    def __init__(self, recycling: RecyclingDrafter, config: OuroborosConfig) -> None:
        self._recycling, self._config = recycling, config
        self._learnt = self._of_prompt = self._new_pool()
        self._recent: list[int] = []

    def _new_pool(self) -> PhrasePool:
        return PhrasePool(capacity=self._config.capacity, length=self._config.length)

    def begin(self, request: DraftRequest) -> None:
        self._recycling.begin(request)
        if not self._config.history:
            self._learnt = self._new_pool()
        self._of_prompt = self._new_pool()
        self._of_prompt.add_text(request.prompt_ids)
        self._recent = list(request.prompt_ids[-self._config.length :])

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._recycling.observe(new_ids, verified)
        if verified is not None:
            self._learn_agreed(verified.tree, verified.logits_NV.argmax(dim=-1).tolist())
        text = [*self._recent, *new_ids]
        for place, token_id in enumerate(text):
            self._learnt.add(token_id, text[place + 1 :])
        self._recent = text[-self._config.length :]

    def _learn_agreed(self, tree: DraftTree, chosen: Sequence[int]) -> None:
        """The target's choices from a node on, wherever the tree holds the first of them."""
        places = zip(tree.parents, tree.tokens, strict=True)
        nodes = {place: node for node, place in enumerate(places)}
        phrases: dict[int, Phrase] = {}
        for node in reversed(range(len(tree))):
            agreed = nodes.get((node, chosen[node]))
            phrases[node] = (chosen[node], *(() if agreed is None else phrases[agreed]))
            if agreed is not None:
                self._learnt.add(tree.tokens[node], phrases[node])

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        self._add_phrases(tree, 0, tree.root, source=source)
        most = len(tree) + tree.room
        # As many whatever the room, so that a smaller tree is the beginning of a larger one.
        tree.allow(min(tree.room, self._config.max_nodes // 3))
        self._recycling.extend_tree(tree, source=source + 1)
        tree.allow(most - len(tree))
        drafted = tree.build()
        deepest = max(range(len(drafted)), key=drafted.depths.__getitem__)
        self._add_phrases(tree, deepest, drafted.tokens[deepest], source=source)

    def _add_phrases(self, tree: TreeBuilder, node: int, token_id: int, *, source: int) -> None:
        known = chain(self._learnt.behind(token_id), self._of_prompt.behind(token_id))
        for rank, phrase in enumerate(islice(known, self._config.phrases)):
            parent: int | None = node
            for follower, claim in zip(phrase, _claims(rank), strict=False):
                if parent is not None:
                    parent = tree.add(parent, follower, source=source, claim=claim)


def _claims(rank: int) -> Iterator[Claim]:
    """Of the tokens of a phrase to which `rank` newer ones were preferred."""
    return chain([Claim(_BEGINS / (1 + rank), 2 * rank)], repeat(Claim(_GOES_ON, 2 * rank + 1)))


@dataclass(kw_only=True, slots=True)
class OuroborosConfig(DrafterConfig):
    """Config of `OuroborosDrafter`.

    Attributes:
        phrases: proposed behind the last token, and again behind the deepest node.
        length: tokens of a phrase.
        capacity: phrases that are remembered for each token.
        history: phrases of earlier requests are remembered, too.
        width: followers remembered for each token by token recycling.
    """

    phrases: int = 2
    length: int = 6
    capacity: int = 16
    history: bool = False
    width: int = 8

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        for name in ("phrases", "length", "capacity", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"drafter.{name}={getattr(self, name)} must be at least 1")

    def build_drafter(self, target: DraftTarget) -> OuroborosDrafter:
        return OuroborosDrafter(RecyclingDrafter(width=self.width), self)
