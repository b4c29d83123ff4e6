"""Drafts from a smaller language model, its LM head trimmed to the tokens that occur.

Letters: T rows of a pass, K likeliest followers of a token, C tokens of the trimmed head, M hidden
size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import ClassVar

import torch
from torch import Tensor

from apb.errors import InputError
from apb.sampling import filtered_probs, new_generator
from apb.speculate.base import (
    Drafter,
    DrafterConfig,
    DraftRequest,
    DraftTarget,
    Verified,
)
from apb.speculate.draft_reader import DraftReader
from apb.speculate.lm_head import LmHead, TrimmedHeads, frequent_tokens
from apb.speculate.tree import Claim, Proposal, ProposalKind, TreeBuilder


@dataclass(slots=True, eq=False)
class _Place:
    """Where drafts may follow: behind the last token of the text, or behind a draft."""

    row: int = 0
    """In what the model has read."""
    node: int | None = None
    """In the tree, once it is there."""
    score: float = 0.0
    """Log-probability of the path."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Draft(_Place):
    token_id: int
    parent: _Place


class ModelDrafter(Drafter):
    """Speculative decoding with a draft model (Leviathan et al. 2023,
    https://arxiv.org/abs/2211.17192) that grows trees as EAGLE-2 does (Li et al. 2024,
    https://arxiv.org/abs/2406.16858): level by level it reads the likeliest few, and the best of
    all tokens that it has considered are proposed.

    The model sees the first tokens of the text and its last ones, at their true positions.
    """

    def __init__(
        self,
        reader: DraftReader,
        head_for: Callable[[Sequence[int]], LmHead],
        config: DraftModelConfig,
    ) -> None:
        """`head_for` gives the rows of the model's LM head for a prompt."""
        self._reader, self._head_for = reader, head_for
        self._depth, self._topk = config.depth, config.topk
        self._head: LmHead | None = None

    def begin(self, request: DraftRequest) -> None:
        self._head = None  # two at once may not fit
        self._head = self._head_for(request.prompt_ids)
        self._reader.begin(request.prompt_ids)

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._reader.advance(new_ids)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        if tree.is_full:
            return
        known = len(tree) - 1  # what others have proposed takes no room if it is proposed again
        for draft in self._best(tree.room + known):
            if draft.parent.node is not None:
                claim = Claim(math.exp(draft.score - draft.parent.score))
                draft.node = tree.add(draft.parent.node, draft.token_id, source=source, claim=claim)

    def _best(self, budget: int) -> list[_Draft]:
        """At most `budget` drafts, best first and so parents first."""
        row, states_TM = self._reader.read_root()
        beam: Sequence[_Place] = [_Place(row, node=0)]
        best: list[_Draft] = []
        last = min(self._depth, budget)
        for depth in range(1, last + 1):
            level = list(self._followers(beam, states_TM))
            best = nlargest(budget, [*best, *level], key=lambda draft: draft.score)
            # Behind a draft that is not among the best there can be none that is.
            fresh = set(level)
            worthy = [draft for draft in best if draft in fresh][: self._topk]
            if depth == last or not worthy:
                break
            states_TM, beam = self._read(worthy), worthy
        return best

    def _followers(self, places: Sequence[_Place], states_TM: Tensor) -> Iterator[_Draft]:
        assert self._head is not None, "extend_tree before begin"
        gains_TK, ids_TK = (best.tolist() for best in self._head.best(states_TM, self._topk))
        for place, gains, ids in zip(places, gains_TK, ids_TK, strict=True):
            for gain, token_id in zip(gains, ids, strict=True):
                yield _Draft(token_id=token_id, parent=place, score=place.score + gain)

    def _read(self, drafts: Sequence[_Draft]) -> Tensor:
        token_ids = [draft.token_id for draft in drafts]
        rows, states_TM = self._reader.read(token_ids, [draft.parent.row for draft in drafts])
        for draft, row in zip(drafts, rows, strict=True):
            draft.row = row
        return states_TM


class SampledModelDrafter(ModelDrafter):
    """Draws a chain from the model where the target samples; grows trees where it is greedy.

    A drawn token is accepted with probability min(1, p / q) (Leviathan et al.), more often than a
    likely one where both distributions are wide.
    """

    proposes: ClassVar[frozenset[ProposalKind]] = frozenset({ProposalKind.onehot, ProposalKind.iid})

    def begin(self, request: DraftRequest) -> None:
        super().begin(request)
        self._sampling = request.sampling
        self._generator = new_generator(request.sampling.seed, stream="draft model")

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        if self._sampling.temperature == 0.0:
            return super().extend_tree(tree, source=source)
        if tree.is_full:
            return
        row, states_TM = self._reader.read_root()
        node = 0
        for left in reversed(range(min(self._depth, tree.room))):
            proposal = self._draw(states_TM)
            nodes = tree.add_drawn(node, proposal, source=source)
            if not (nodes and left):
                return
            (node,) = nodes
            rows, states_TM = self._reader.read(proposal.drawn, [row])
            row = rows[0]

    def _draw(self, states_1M: Tensor) -> Proposal:
        """A token, and what it was drawn from."""
        assert self._head is not None, "extend_tree before begin"
        ids_C = self._head.ids_C
        logits_C = self._head.logits(states_1M)[0].cpu()
        probs_C = filtered_probs(logits_C, self._sampling)
        index = int(probs_C.multinomial(1, generator=self._generator))
        token_id = index if ids_C is None else int(ids_C[index])
        return Proposal(ProposalKind.iid, probs_C, (token_id,), ids_C)


@dataclass(kw_only=True, slots=True)
class DraftModelConfig(DrafterConfig):
    """Config of `ModelDrafter`.

    Attributes:
        model: a name in `conf/model/`, a folder, a GGUF file or a Hub id.
        vocabulary: a file with the tokens that the head is trimmed to; None keeps it whole.
        vocabulary_size: the most frequent of them, stop tokens included; None keeps all.
        document_ids: tokens of the prompt join them.
        depth: tokens of the longest draft.
        topk: drafts that are read, and followers of each that are considered, at every depth.
        sinks: tokens of the beginning of the text that the model sees.
        window: tokens of its end.
        stochastic: draw drafts where the target samples, instead of taking the likeliest.
    """

    model: str = ""
    vocabulary: str | None = None
    vocabulary_size: int | None = None
    document_ids: bool = True
    depth: int = 4
    topk: int = 4
    sinks: int = 4
    window: int = 1024
    stochastic: bool = False

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        for name, least in (("depth", 1), ("topk", 1), ("sinks", 0), ("window", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise InputError(f"drafter.{name}={value} must be at least {least}")
        if self.vocabulary_size is not None and self.vocabulary is None:
            raise InputError(
                f"drafter.vocabulary_size={self.vocabulary_size} cuts the list in "
                "drafter.vocabulary, which is not set"
            )

    def build_drafter(self, target: DraftTarget) -> ModelDrafter:
        if not self.model:
            raise InputError(
                "drafter=model needs drafter.model: a smaller model of the target's family, by "
                "its name in conf/model, its folder, GGUF file or Hub id"
            )
        model = target.load_draft_model(
            self.model,
            sinks=self.sinks,
            window=self.window,
            spare=DraftReader.SPARE + self.topk * self.depth,
        )
        reader = DraftReader(model, sinks=self.sinks, window=self.window)
        build = SampledModelDrafter if self.stochastic else ModelDrafter
        return build(reader, self._heads(model.head_VM, target), self)

    def _heads(self, head_VM: Tensor, target: DraftTarget) -> Callable[[Sequence[int]], LmHead]:
        """The rows of the head that a prompt needs."""
        # Models of one family may pad their vocabularies to different sizes.
        vocab_size = min(target.embedding().shape[0], head_VM.shape[0])
        if self.vocabulary is None:
            whole = LmHead(head_VM[:vocab_size], torch.arange(vocab_size, device=head_VM.device))
            return lambda _: whole
        vocabulary = frequent_tokens(
            self.vocabulary, self.vocabulary_size, target, vocab_size=vocab_size
        )
        return TrimmedHeads(
            head_VM[:vocab_size],
            vocabulary,
            document_ids=self.document_ids,
            dtype=head_VM.dtype,
        )
