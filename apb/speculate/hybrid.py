"""Several drafters, one tree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from apb.errors import InputError
from apb.speculate.base import Drafter, DraftRequest, DraftTarget, Verified
from apb.speculate.eagle import EagleDrafter
from apb.speculate.frspec import FrSpecConfig
from apb.speculate.recycling import RecyclingConfig, RecyclingDrafter
from apb.speculate.suffix import SuffixConfig, SuffixDrafter
from apb.speculate.tree import TreeBuilder


class Worth:
    """Whether steps with something yield more tokens a second than steps without it.

    A step lasts from one question to the next, so that drafting, verifying and all exchanges are in
    it. The worse choice is made once in a while, lest a change of the text go unnoticed.
    """

    _KEEP = 0.95
    _EXPLORE_EVERY = 12

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._tokens, self._seconds = [0.0, 0.0], [0.0, 0.0]
        self._last: tuple[bool, float] | None = None
        self._count = 0

    def begin(self) -> None:
        """A new request: what passes until its first step is none."""
        self._last = None

    def emitted(self, count: int) -> None:
        if self._last is not None:
            self._tokens[self._last[0]] += count

    def try_it(self, may: bool) -> bool:
        """Whether to use it in the step that begins now; steps in which it may not be are left
        out.
        """
        now = self._clock()
        if self._last is not None:
            used, started = self._last
            self._seconds[used] += now - started
            self._tokens[used] *= self._KEEP
            self._seconds[used] *= self._KEEP
        choice = may and self._choice()
        self._last = (choice, now) if may else None
        return choice

    def _choice(self) -> bool:
        self._count += 1
        if not all(self._seconds):
            return not self._seconds[True]
        rates = [tokens / s for tokens, s in zip(self._tokens, self._seconds, strict=True)]
        better = rates[True] >= rates[False]
        return better if self._count % self._EXPLORE_EVERY else not better


class HybridDrafter(Drafter):
    """Suffixes of the document, recycled tokens and, where there is one, an EAGLE head.

    Copies reach far where the answer quotes, and the others help where it does not: on long
    documents the pair of the first two is the best without training, and with a head in OWL's
    comparison the best of all (https://arxiv.org/abs/2510.07535). Paths are merged by their longest
    common beginning; the controller weighs the claims of one drafter against those of another.
    """

    def __init__(
        self,
        suffix: SuffixDrafter,
        recycling: RecyclingDrafter,
        head: EagleDrafter | None,
        *,
        enough: float,
    ) -> None:
        """The head alone takes time that counts: it is not asked where the document promises
        `enough` tokens, nor where answers have come faster without it.
        """
        self._suffix, self._recycling, self._head = suffix, recycling, head
        self._enough, self._worth = enough, Worth()
        if head is not None:
            self.needs = head.needs

    def begin(self, request: DraftRequest) -> None:
        self._worth.begin()
        for drafter in self._drafters:
            drafter.begin(request)

    def read(self, positions: Sequence[int], states_TE: Tensor) -> None:
        if self._head is not None:
            self._head.read(positions, states_TE)

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._worth.emitted(len(new_ids))
        for drafter in self._drafters:
            drafter.observe(new_ids, verified)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        each = tree.room
        self._suffix.extend_tree(tree, source=source)
        promised = tree.outlook
        tree.allow(each)
        self._recycling.extend_tree(tree, source=source + 1)
        if self._head is not None and self._worth.try_it(promised < self._enough):
            tree.allow(each)
            self._head.extend_tree(tree, source=source + 2)

    @property
    def _drafters(self) -> tuple[Drafter, ...]:
        both = (self._suffix, self._recycling)
        return both if self._head is None else (*both, self._head)


@dataclass(kw_only=True, slots=True)
class HybridConfig(FrSpecConfig):
    """Config of `HybridDrafter`: the settings of `suffix`, `recycling` and `frspec`.

    Attributes:
        use_head: draft by an EAGLE head as well, where `head` is set or apb ships one for the
            model.
        enough: tokens that suffixes have to promise for the head not to be asked.
    """

    min_match: int = 2
    factor: float = 2.0
    width: int = 8
    use_head: bool = True
    enough: float = 4.0
    min_chance: float = 0.3
    bf16: bool = True

    def __post_init__(self) -> None:
        FrSpecConfig.__post_init__(self)
        self._suffix()
        self._recycling()
        if self.enough < 0:
            raise InputError(f"drafter.enough={self.enough} must not be negative")

    def _suffix(self) -> SuffixConfig:
        return SuffixConfig(min_match=self.min_match, factor=self.factor)

    def _recycling(self) -> RecyclingConfig:
        return RecyclingConfig(width=self.width)

    def build_drafter(self, target: DraftTarget) -> HybridDrafter:  # type: ignore[override]
        has_head = bool(self.head) or target.drafting is not None
        return HybridDrafter(
            self._suffix().build_drafter(target),
            self._recycling().build_drafter(target),
            FrSpecConfig.build_drafter(self, target) if self.use_head and has_head else None,
            enough=self.enough,
        )
