"""The rows of an LM head that a drafter scores.

Letters: T rows of a pass, M hidden size, V vocabulary, C tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apb.packed import product
from apb.speculate.base import DraftTarget
from apb.speculate.vocabulary import DraftVocabulary


class LmHead:
    """Rows of an LM head and the target's ids that they stand for; None where they are equal."""

    def __init__(self, weight_CM: Tensor, ids_C: Tensor | None = None) -> None:
        self.ids_C = ids_C
        self._product = product(weight_CM)

    def logits(self, x_TM: Tensor) -> Tensor:
        """``[T, C]`` in fp32."""
        return self._product(x_TM).float()

    def best(self, x_TM: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids of each row's likeliest tokens, both ``[T, count]``."""
        logits_TC = self.logits(x_TM)
        best = logits_TC.topk(min(count, logits_TC.shape[1]))
        logprobs_TW = best.values - logits_TC.logsumexp(dim=-1, keepdim=True)
        ids_TW = best.indices if self.ids_C is None else self.ids_C[best.indices]
        return logprobs_TW, ids_TW


class TrimmedHeads:
    """For each prompt the rows of frequent tokens, and of the prompt's own if wanted (FR-Spec)."""

    def __init__(
        self,
        weight_VM: Tensor,
        vocabulary: DraftVocabulary,
        *,
        document_ids: bool,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is that of the rows that are scored."""
        self._weight_VM, self._vocabulary = weight_VM, vocabulary
        self._document_ids, self._dtype = document_ids, dtype

    def __call__(self, prompt_ids: Sequence[int]) -> LmHead:
        vocab_size = self._weight_VM.shape[0]
        known = (token_id for token_id in prompt_ids if token_id < vocab_size)
        vocabulary = self._vocabulary.with_ids(known if self._document_ids else ())
        ids_C = vocabulary.token_ids_C.to(self._weight_VM.device)
        return LmHead(self._weight_VM[ids_C].to(self._dtype), ids_C)


def frequent_tokens(
    path: str, size: int | None, target: DraftTarget, *, vocab_size: int
) -> DraftVocabulary:
    """The first `size` tokens of a list, None being all of them, with every stop token.

    Raises:
        InputError: no such list, or not one of the target's vocabulary.
    """
    listed = DraftVocabulary.read(path, vocab_size=vocab_size, tokenizer_hash=target.tokenizer_hash)
    if size is None:
        return listed.with_ids(sorted(target.stop_ids))
    return listed.first(size, target.stop_ids)
