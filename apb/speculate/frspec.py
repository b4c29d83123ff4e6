"""Drafts by an EAGLE head that scores frequent tokens alone.

Letters: V the target's vocabulary, M hidden size, C tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apb.errors import InputError
from apb.speculate.base import DraftTarget
from apb.speculate.eagle import EagleConfig, EagleDrafter
from apb.speculate.eagle_levels import LmHead
from apb.speculate.vocabulary import DraftVocabulary

SHIPPED_LIST = "vocabulary.safetensors"
"""The list beside a head."""


@dataclass(kw_only=True, slots=True)
class FrSpecConfig(EagleConfig):
    """Config of `EagleDrafter` with a vocabulary of frequent tokens (FR-Spec).

    Attributes:
        vocabulary: file of a frequency list, apb's or FR-Spec's ``freq_*.pt``; empty is the one
            that apb ships for the model.
        vocabulary_size: tokens of it that are used, all stop tokens among them; None is all.
        document_ids: add the tokens of the prompt, which its answer is likely to use.
    """

    vocabulary: str = ""
    vocabulary_size: int | None = None
    document_ids: bool = True

    def build_drafter(self, target: DraftTarget) -> EagleDrafter:
        checkpoint = self.checkpoint(target)
        if checkpoint.ids_C is not None:
            raise InputError(
                f"the EAGLE head {self.head} has a vocabulary of {len(checkpoint.ids_C)} tokens of "
                "its own, which drafter=frspec cannot trim: use drafter=eagle"
            )
        vocabulary = self._vocabulary(target)
        weight_VM = target.head() if checkpoint.lm_head_CM is None else checkpoint.lm_head_CM
        weight_VM = weight_VM.to(target.device, target.dtype)

        def lm_head_for(prompt_ids: Sequence[int]) -> LmHead:
            wanted = vocabulary.with_ids(prompt_ids) if self.document_ids else vocabulary
            ids_C = wanted.token_ids_C.to(target.device)
            return LmHead(weight_VM[ids_C], ids_C)

        return self.drafter(target, checkpoint, lm_head_for)

    def _vocabulary(self, target: DraftTarget) -> DraftVocabulary:
        path = self.vocabulary
        if not path and target.drafting is not None:
            path = str(target.drafting / SHIPPED_LIST)
        if not path:
            raise InputError(
                "drafter.vocabulary is not set, and apb ships none for this model: give a list of "
                "frequent tokens, or use drafter=eagle for all"
            )
        listed = DraftVocabulary.read(
            path,
            vocab_size=target.head().shape[0],
            tokenizer_hash=target.tokenizer_hash,
        )
        if self.vocabulary_size is None:
            return listed.with_ids(sorted(target.stop_ids))
        return listed.first(self.vocabulary_size, target.stop_ids)
