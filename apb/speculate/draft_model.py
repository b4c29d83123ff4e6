"""Drafts from a smaller language model, its LM head trimmed to the tokens that occur.

Letters: T rows of a pass, K likeliest followers of a token, C tokens of the trimmed head, M hidden
size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from apb.errors import InputError
from apb.sampling import filtered_probs, new_generator
from apb.speculate.base import (
    Drafter,
    DrafterConfig,
    DraftModel,
    DraftRequest,
    DraftTarget,
    Verified,
)
from apb.speculate.draft_reader import DraftReader
from apb.speculate.tree import Proposal, ProposalKind, TreeBuilder
from apb.speculate.vocabulary import DraftVocabulary


class TrimmedHead(NamedTuple):
    """The rows of an LM head for some tokens (VocabTrim, https://arxiv.org/abs/2506.22694)."""

    weight_CM: Tensor
    token_ids_C: Tensor

    @classmethod
    def of(cls, head_VM: Tensor, token_ids_C: Tensor) -> TrimmedHead:
        token_ids_C = token_ids_C.to(head_VM.device)
        return cls(head_VM[token_ids_C], token_ids_C)

    @classmethod
    def whole(cls, head_VM: Tensor) -> TrimmedHead:
        return cls(head_VM, torch.arange(head_VM.shape[0], device=head_VM.device))

    def logits(self, states_TM: Tensor) -> Tensor:
        """``[T, C]`` in fp32."""
        return F.linear(states_TM, self.weight_CM).float()


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
        model: DraftModel,
        config: DraftModelConfig,
        *,
        vocab_size: int,
        vocabulary: DraftVocabulary | None,
    ) -> None:
        self._model, self._vocabulary, self._vocab_size = model, vocabulary, vocab_size
        self._document_ids = config.document_ids
        self._depth, self._topk = config.depth, config.topk
        self._reader = DraftReader(model, sinks=config.sinks, window=config.window)
        self._head = TrimmedHead.whole(model.head_VM[:vocab_size])

    def begin(self, request: DraftRequest) -> None:
        if self._vocabulary is not None:
            own_ids = request.prompt_ids if self._document_ids else ()
            known_ids = (token_id for token_id in own_ids if token_id < self._vocab_size)
            ids_C = self._vocabulary.with_ids(known_ids).token_ids_C
            self._head = TrimmedHead.of(self._model.head_VM, ids_C)
        self._reader.begin(request.prompt_ids)

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._reader.advance(new_ids)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        if tree.is_full:
            return
        known = len(tree) - 1  # what others have proposed takes no room if it is proposed again
        for draft in self._best(tree.room + known, min_score=tree.min_score):
            if draft.parent.node is not None:
                draft.node = tree.add(draft.parent.node, draft.token_id, source=source)

    def _best(self, budget: int, *, min_score: float) -> list[_Draft]:
        """At most `budget` drafts, best first and so parents first."""
        floor = math.log(min_score) if min_score > 0.0 else -math.inf
        row, states_TM = self._reader.read_root()
        beam: Sequence[_Place] = [_Place(row, node=0)]
        best: list[_Draft] = []
        last = min(self._depth, budget)
        for depth in range(1, last + 1):
            level = [draft for draft in self._followers(beam, states_TM) if draft.score >= floor]
            best = nlargest(budget, [*best, *level], key=lambda draft: draft.score)
            # Behind a draft that is not among the best there can be none that is.
            fresh = set(level)
            worthy = [draft for draft in best if draft in fresh][: self._topk]
            if depth == last or not worthy:
                break
            states_TM, beam = self._read(worthy), worthy
        return best

    def _followers(self, places: Sequence[_Place], states_TM: Tensor) -> Iterator[_Draft]:
        log_probs_TC = self._head.logits(states_TM).log_softmax(dim=-1)
        best = log_probs_TC.topk(min(self._topk, log_probs_TC.shape[1]), dim=-1)
        ids_TK = self._head.token_ids_C[best.indices].tolist()
        for place, ids, gains in zip(places, ids_TK, best.values.tolist(), strict=True):
            for token_id, gain in zip(ids, gains, strict=True):
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
        node, share = 0, 1.0
        for left in reversed(range(min(self._depth, tree.room))):
            # Whether to go on hangs on what was drawn before, never on the draw itself.
            if share < tree.min_score:
                return
            proposal, chance = self._draw(states_TM)
            nodes = tree.add_drawn(node, proposal, source=source)
            if not (nodes and left):
                return
            (node,), share = nodes, share * chance
            rows, states_TM = self._reader.read(proposal.drawn, [row])
            row = rows[0]

    def _draw(self, states_1M: Tensor) -> tuple[Proposal, float]:
        """A token, and how likely it was."""
        logits_C = self._head.logits(states_1M)[0].cpu()
        probs_C = filtered_probs(logits_C, self._sampling)
        index = int(probs_C.multinomial(1, generator=self._generator))
        drawn = (int(self._head.token_ids_C[index]),)
        proposal = Proposal(ProposalKind.iid, probs_C, drawn, self._head.token_ids_C)
        return proposal, float(probs_C[index])


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
        spare = DraftReader.SPARE + self.topk * self.depth
        model = target.load_draft_model(
            self.model, sinks=self.sinks, window=self.window, spare=spare
        )
        # Models of one family may pad their vocabularies to different sizes.
        vocab_size = min(target.embedding().shape[0], model.head_VM.shape[0])
        vocabulary = self._listed(target, vocab_size)
        build = SampledModelDrafter if self.stochastic else ModelDrafter
        return build(model, self, vocab_size=vocab_size, vocabulary=vocabulary)

    def _listed(self, target: DraftTarget, vocab_size: int) -> DraftVocabulary | None:
        if self.vocabulary is None:
            return None
        listed = DraftVocabulary.read(
            self.vocabulary, vocab_size=vocab_size, tokenizer_hash=target.tokenizer_hash
        )
        if self.vocabulary_size is None:
            return listed
        return listed.first(self.vocabulary_size, target.stop_ids)
