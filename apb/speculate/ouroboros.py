"""Drafts lengthened by phrases: what the target has written, and what it would have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.recycling import RecyclingDrafter
from apb.speculate.tree import DraftTree, TreeBuilder

Phrase = tuple[int, ...]


class PhrasePool:
    """For each token the phrases that followed it, the newest first (LRU, as many as `capacity`).

    A phrase that is the beginning of a known one is the known one; one that goes on where a known
    one ended takes its place.
    """

    def __init__(self, *, capacity: int, length: int) -> None:
        self._capacity, self.length = capacity, length
        self._phrases: dict[int, list[Phrase]] = {}

    def add(self, token_id: int, phrase: Sequence[int]) -> None:
        """The newest phrase behind a token, cut to `length`."""
        new = tuple(phrase[: self.length])
        if not new:
            return
        known = self._phrases.setdefault(token_id, [])
        whole = next((old for old in known if old[: len(new)] == new), new)
        others = [old for old in known if whole[: len(old)] != old]
        self._phrases[token_id] = [whole, *others][: self._capacity]

    def fill(self, text: Sequence[int]) -> None:
        """Phrases of a text behind the newer ones, where there is room; its latest come first."""
        for place in reversed(range(len(text) - 1)):
            known = self._phrases.setdefault(text[place], [])
            if len(known) < self._capacity:
                phrase = tuple(text[place + 1 : place + 1 + self.length])
                if not any(old[: len(phrase)] == phrase for old in known):
                    known.append(phrase)

    def behind(self, token_id: int) -> Sequence[Phrase]:
        """The newest first."""
        return self._phrases.get(token_id, ())


class OuroborosDrafter(Drafter):
    """Ouroboros (Zhao et al. 2024, https://arxiv.org/abs/2402.13720) without its draft model.

    Token recycling grows the tree; behind its deepest node hang the newest phrases of that node's
    token, so that a draft that is accepted whole goes on. Phrases come from the answer, and from
    verification: wherever the target agrees with a draft for a while, be it rejected before, its
    own tokens are a phrase.
    """

    def __init__(
        self, pool: PhrasePool, base: RecyclingDrafter, *, base_nodes: int, suffixes: int
    ) -> None:
        self._pool, self._base = pool, base
        self._base_nodes, self._suffixes = base_nodes, suffixes
        self._recent: list[int] = []

    def begin(self, request: DraftRequest) -> None:
        self._base.begin(request)
        self._pool.fill(request.prompt_ids)
        self._recent = list(request.prompt_ids[-self._pool.length :])

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._base.observe(new_ids, verified)
        if verified is not None:
            self._learn_agreed(verified.tree, verified.logits_NV.argmax(dim=-1).tolist())
        self._learn_written(new_ids)

    def _learn_agreed(self, tree: DraftTree, chosen: Sequence[int]) -> None:
        """The target's tokens from a node on, wherever the tree holds more than one of them."""
        children = {
            (parent, token_id): node
            for node, (parent, token_id) in enumerate(zip(tree.parents, tree.tokens, strict=True))
        }
        phrases: dict[int, Phrase] = {}
        for node in reversed(range(len(tree))):
            agreed = children.get((node, chosen[node]))
            phrases[node] = (chosen[node],) if agreed is None else (chosen[node], *phrases[agreed])
            if agreed is not None:
                self._pool.add(tree.tokens[node], phrases[node])

    def _learn_written(self, new_ids: Sequence[int]) -> None:
        text = [*self._recent, *new_ids]
        for place, token_id in enumerate(text):
            self._pool.add(token_id, text[place + 1 :])
        self._recent = text[-self._pool.length :]

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        # Of the same size whatever the budget, so that smaller trees are the beginning of larger.
        base = TreeBuilder(tree.root, max_nodes=1 + self._base_nodes, min_score=tree.min_score)
        self._base.extend_tree(base, source=source)
        drafted, nodes = base.build(), [0]
        for parent, token_id in list(zip(drafted.parents, drafted.tokens, strict=True))[1:]:
            node = tree.add(nodes[parent], token_id, source=source)
            if node is None:
                return
            nodes.append(node)
        self._lengthen(tree, source=source)

    def _lengthen(self, tree: TreeBuilder, *, source: int) -> None:
        built = tree.build()
        depths = built.depths
        deepest = max(range(len(built)), key=depths.__getitem__)
        for phrase in self._pool.behind(built.tokens[deepest])[: self._suffixes]:
            node: int | None = deepest
            for token_id in phrase:
                if node is not None:
                    node = tree.add(node, token_id, source=source)
