"""What a drafter is: it sees the prompt and every verified step, and proposes trees.

Letters: N nodes of a tree, M hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from apb.errors import InputError
from apb.speculate.control import ControllerKind
from apb.speculate.tree import DraftTree, TreeBuilder

MAX_NODES = 64
"""What one launch of the decoding kernel takes."""


class Verified(NamedTuple):
    """One step of the target over a tree, and what came of it."""

    tree: DraftTree
    new_ids: tuple[int, ...]
    """What was emitted: accepted tokens behind the root, and the target's own."""
    hidden_NM: Tensor
    """After the final norm."""
    logits_NV: Tensor


class Drafter(ABC):
    """Proposes continuations; lives on the owner alone.

    Whatever it proposes, the answer is the target's: drafts only decide how many tokens a step
    yields.
    """

    @abstractmethod
    def begin(self, prompt_ids: Sequence[int]) -> None:
        """A new request: its document and question, before the first token of the answer."""

    @abstractmethod
    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        """Add nodes to a tree that grows from the last token that was observed."""

    @abstractmethod
    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        """Tokens that were emitted, and the step they come from (None for the first token)."""


@dataclass(kw_only=True, slots=True)
class DrafterConfig(ABC):
    """Config of a drafter.

    Attributes:
        max_nodes: of a tree, the root included; 1 is plain decoding.
        controller: how many of them each step gets, `measured` or `fixed`.
    """

    max_nodes: int = 32
    controller: ControllerKind = ControllerKind.measured

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MAX_NODES:
            raise InputError(
                f"drafter.max_nodes={self.max_nodes} must lie between 1 and {MAX_NODES}"
            )

    @abstractmethod
    def build_drafter(self) -> Drafter | None:
        """The drafter, or None for plain decoding."""
