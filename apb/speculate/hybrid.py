"""Several drafters, one tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.recycling import RecyclingConfig, RecyclingDrafter
from apb.speculate.suffix import SuffixConfig, SuffixDrafter
from apb.speculate.tree import TreeBuilder


class HybridDrafter(Drafter):
    """Suffixes of the document first, recycled tokens where those leave room.

    The best training-free pair on long documents (SAM decoding with token recycling, in OWL's
    comparison, https://arxiv.org/abs/2510.07535): copies reach far where the answer quotes, and
    recycled tokens help where it does not. Paths are merged by their longest common beginning.
    """

    def __init__(self, suffix: SuffixDrafter, recycling: RecyclingDrafter) -> None:
        self._drafters: tuple[Drafter, ...] = (suffix, recycling)

    def begin(self, request: DraftRequest) -> None:
        for drafter in self._drafters:
            drafter.begin(request)

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        for drafter in self._drafters:
            drafter.observe(new_ids, verified)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        for offset, drafter in enumerate(self._drafters):
            drafter.extend_tree(tree, source=source + offset)


@dataclass(kw_only=True, slots=True)
class HybridConfig(DrafterConfig):
    """Config of `HybridDrafter`: the settings of `suffix` and `recycling`."""

    min_match: int = 2
    factor: float = 2.0
    width: int = 8

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        self._suffix()
        self._recycling()

    def _suffix(self) -> SuffixConfig:
        return SuffixConfig(min_match=self.min_match, factor=self.factor)

    def _recycling(self) -> RecyclingConfig:
        return RecyclingConfig(width=self.width)

    def build_drafter(self, target: DraftTarget) -> HybridDrafter:
        return HybridDrafter(
            self._suffix().build_drafter(target), self._recycling().build_drafter(target)
        )
