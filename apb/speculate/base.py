"""What a drafter is: it sees the prompt and every verified step, and proposes trees.

Letters: N nodes of a tree, E width of the target's states that a drafter reads, M hidden size,
V vocabulary; of a draft model: T rows of this pass, P rows read since the last `keep`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from apb.errors import InputError
from apb.rotary import Rotary
from apb.sampling import SamplingParams
from apb.speculate.control import ControllerKind
from apb.speculate.tree import DraftTree, ProposalKind, TreeBuilder
from apb.speculate.verify import VerifierKind

MAX_NODES = 64
"""What one launch of the decoding kernel takes."""


class Verified(NamedTuple):
    """One step of the target over a tree, and what came of it."""

    tree: DraftTree
    path: tuple[int, ...]
    """Accepted nodes, the root first."""
    new_ids: tuple[int, ...]
    """What was emitted: accepted tokens behind the root, and the target's own. Where the answer
    ended within them, the rest is missing.
    """
    logits_NV: Tensor
    states_NE: Tensor | None = None
    """What `Needs` asked for, of every node."""


class Needs(NamedTuple):
    """Which of the target's states a drafter reads; nothing else is kept for it.

    Wanted are the states after the final norm, or those that enter some layers side by side.
    """

    final: bool = False
    entering: tuple[int, ...] = ()
    """Layers, counted from 0; their states before any norm."""
    first: int = 0
    """Positions kept of the beginning of a prompt, copies of them included."""
    last: int = 0
    """Rows kept of its end."""

    @property
    def anything(self) -> bool:
        return self.final or bool(self.entering)


class Tapped(NamedTuple):
    """States of some rows of a forward pass."""

    rows: Sequence[int]
    """Which rows of the pass, ascending."""
    states_TE: Tensor


class StateTap(Protocol):
    """Keeps states of the target's forward passes."""

    def take(self) -> Tapped:
        """Of the last pass: all rows of a small one, else those at the first positions and the last
        rows; they are let go.
        """


class DraftModel(Protocol):
    """A language model that drafts, with the KV of the first tokens it was given and the last."""

    @property
    def head_VM(self) -> Tensor:
        """The LM head, not a copy."""

    @property
    def room(self) -> int:
        """Rows that may still be read before `keep` has to follow."""

    def clear(self) -> None:
        """Forget everything."""

    def read(
        self, token_ids: Sequence[int], positions: Sequence[int], visible_TP: Tensor | None = None
    ) -> Tensor:
        """Final states ``[T, M]`` of tokens that see all that is kept.

        Of the rows read since the last `keep`, their own among them, they see those that
        `visible_TP` says; None is causal.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Of the rows read since the last time, keep these, in order of position."""


class DraftTarget(Protocol):
    """What drafters may know of the target model."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def tokenizer_hash(self) -> str:
        """Of the vocabulary: the same for two tokenizers that give the same ids to all tokens."""

    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def drafting(self) -> Path | None:
        """A folder with an EAGLE head and a frequency list for this model, where there is one."""

    @property
    def rotary(self) -> Rotary: ...
    def embedding(self) -> Tensor:
        """The input embedding ``[V, M]``, not a copy."""

    def head(self) -> Tensor:
        """The LM head ``[V, M]``, not a copy; it may be the embedding."""

    def tap(self, needs: Needs) -> StateTap:
        """Keep those states of every forward pass from now on."""

    def load_draft_model(self, name: str, *, sinks: int, window: int, spare: int) -> DraftModel:
        """A model with the target's tokenizer, which keeps the first `sinks` tokens and `window`.

        `spare` is its room where these are full.

        Raises:
            InputError: not found, not supported, or of another tokenizer.
        """


class DraftRequest(NamedTuple):
    """A new request, before the first token of its answer."""

    prompt_ids: Sequence[int]
    sampling: SamplingParams


class Drafter(ABC):
    """Proposes continuations; lives on the owner alone.

    Whatever it proposes, the answer is the target's: drafts only decide how many tokens a step
    yields.
    """

    needs: Needs = Needs()
    proposes: ClassVar[frozenset[ProposalKind]] = frozenset({ProposalKind.onehot})
    """The kinds of proposals in its trees."""

    @abstractmethod
    def begin(self, request: DraftRequest) -> None:
        """A new request; called in a thread of its own while the ranks prefill."""

    def read(self, positions: Sequence[int], states_TE: Tensor) -> None:  # noqa: B027
        """States of tokens of the prompt, in order of position: those that the owner has run.

        Called only where `needs` asks for some: after the prefill and after the question.
        """

    @abstractmethod
    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        """Add nodes to a tree that grows from the last token that was observed."""

    @abstractmethod
    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        """Tokens that were emitted, and the step they come from.

        There is none for the first token.
        """


@dataclass(kw_only=True, slots=True)
class DrafterConfig(ABC):
    """Config of a drafter.

    Attributes:
        max_nodes: of a tree, the root included; 1 is plain decoding.
        controller: how many of them each step gets.
        verifier: the test that drafted tokens have to pass; `auto` is the one that fits.
    """

    max_nodes: int = 32
    controller: ControllerKind = ControllerKind.expected
    verifier: VerifierKind = VerifierKind.auto

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MAX_NODES:
            raise InputError(
                f"drafter.max_nodes={self.max_nodes} must lie between 1 and {MAX_NODES}"
            )

    @abstractmethod
    def build_drafter(self, target: DraftTarget) -> Drafter | None:
        """The drafter, or None for plain decoding.

        Raises:
            InputError: it does not fit the target.
        """
