"""Drafts by an EAGLE head that scores frequent tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

from apb.errors import InputError
from apb.speculate.base import DraftTarget
from apb.speculate.eagle import EagleConfig, EagleDrafter
from apb.speculate.lm_head import TrimmedHeads, frequent_tokens
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
        weight_VM = target.head() if checkpoint.lm_head_CM is None else checkpoint.lm_head_CM
        heads = TrimmedHeads(
            weight_VM.to(target.device),
            self._vocabulary(target),
            document_ids=self.document_ids,
            dtype=self.dtype(target),
        )
        return self.drafter(target, checkpoint, heads)

    def _vocabulary(self, target: DraftTarget) -> DraftVocabulary:
        path = self.vocabulary
        if not path and target.drafting is not None:
            path = str(target.drafting / SHIPPED_LIST)
        if not path:
            raise InputError(
                "drafter.vocabulary is not set, and apb ships none for this model: give a list of "
                "frequent tokens, or use drafter=eagle for all"
            )
        vocab_size = target.head().shape[0]
        return frequent_tokens(path, self.vocabulary_size, target, vocab_size=vocab_size)
