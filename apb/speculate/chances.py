"""How likely drafted tokens are to be accepted, learnt from what became of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

from apb.speculate.tree import DraftTree

_SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Bounds of the classes of claimed shares."""
_PRIOR_WEIGHT = 4.0
"""So many observations a claim is worth."""
_KEEP = 0.98
"""What an observation counts less with each later one of its class."""


class Chances:
    """What drafters' claims are worth.

    A drafter says of each node how likely it takes it to be accepted after its parent. Claims of
    different drafters do not compare: a share of two occurrences is not the probability of a
    network. So claims of one source and kind, of about the same height, are a class, and each class
    is weighed by how often it came true. Every step tells that of all children of accepted nodes,
    also of those that were not sent to the target, because the target's own token is known there.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, int], tuple[float, float]] = {}

    def of(self, tree: DraftTree) -> list[float]:
        """The chance of each node to be accepted; no child's is above its parent's."""
        chances = [1.0]
        for node in range(1, len(tree)):
            chances.append(chances[tree.parents[node]] * self._after_parent(tree, node))
        return chances

    def _after_parent(self, tree: DraftTree, node: int) -> float:
        claim = tree.claims[node]
        hits, weight = self._seen.get(self._class(tree, node), (0.0, 0.0))
        return (hits + _PRIOR_WEIGHT * claim.share) / (weight + _PRIOR_WEIGHT)

    def learn(self, tree: DraftTree, emitted: Sequence[int]) -> None:
        """The tokens that came after the root of a tree."""
        node: int | None = 0
        for token_id in emitted:
            if node is None:
                return
            following = None
            for child in tree.children(node):
                hit = tree.tokens[child] == token_id
                key = self._class(tree, child)
                hits, weight = self._seen.get(key, (0.0, 0.0))
                self._seen[key] = _KEEP * hits + hit, _KEEP * weight + 1.0
                following = child if hit else following
            node = following

    def _class(self, tree: DraftTree, node: int) -> tuple[int, int, int]:
        claim = tree.claims[node]
        height = sum(claim.share >= bound for bound in _SHARES)
        return tree.sources[node], claim.kind, height


def by_chance(chances: Sequence[float]) -> list[int]:
    """Nodes with the best chances first, parents before children."""
    return sorted(range(len(chances)), key=lambda node: (-chances[node], node))


def best_part(tree: DraftTree, chances: Sequence[float], size: int) -> DraftTree:
    """The nodes with the best chances, so many with the root; parents always come along."""
    return tree.part(sorted(by_chance(chances)[:size]))
