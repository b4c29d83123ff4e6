"""The tasks of the quality benchmark: questions about generated documents, and real prose."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from apb.evaluate.prose import PASSAGES
from apb.prompts.base import PromptTokens
from apb.prompts.needle import is_correct, make_needle
from benchmarks.quality_lab import REFERENCE, Lab

PROSE = "prose"
MAX_ANSWER_TOKENS = 24
CONTINUATION_LEN = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one method did on one task."""

    task: str
    group: str
    """A kind of needle, or `prose`."""
    length: int
    """Wanted tokens of the document."""
    method: str
    prefill_s: float
    logprob: float
    """Per token, of the right answer or of the passage's true continuation."""
    correct: bool | None = None
    text: str | None = None
    kl: float | None = None
    """Mean KL(full || method) over the rows of the continuation."""


class Task(Protocol):
    """One document, the same for all methods."""

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int: ...
    def run(self, lab: Lab, methods: Sequence[str]) -> Iterator[Row]: ...


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """A generated document and a question: is the answer right, and how likely is the right one?"""

    kind: str
    length: int
    sample: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.length}-{self.sample}"

    def run(self, lab: Lab, methods: Sequence[str]) -> Iterator[Row]:
        seed = zlib.crc32(self.name.encode())
        case = make_needle(lab.count_tokens, context_len=self.length, seed=seed, kind=self.kind)
        prompt = lab.prompt(case)
        answer_ids = lab.encode(case.answer)
        room = len(prompt.query_ids) + max(MAX_ANSWER_TOKENS, len(answer_ids))
        for method in methods:
            prefill_s = lab.prefill(method, prompt, room=room)
            logprob = lab.answer_logprob(prompt.query_ids, answer_ids)
            text = lab.answer(prompt.query_ids, max_tokens=MAX_ANSWER_TOKENS)
            yield Row(
                task=self.name,
                group=self.kind,
                length=self.length,
                method=method,
                prefill_s=prefill_s,
                logprob=logprob,
                correct=is_correct(case, text),
                text=text,
            )


@dataclass(frozen=True, slots=True)
class ProseTask:
    """The first tokens of a passage as context, without a query, and the next ones to predict."""

    name: str
    document_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @classmethod
    def load(cls, lab: Lab, passage: str, *, max_context: int) -> ProseTask:
        ids = lab.encode(PASSAGES[passage](), at_start=True)
        cut = min(len(ids) - CONTINUATION_LEN, max_context)
        return cls(f"{passage}-{cut}", tuple(ids[:cut]), tuple(ids[cut : cut + CONTINUATION_LEN]))

    @property
    def length(self) -> int:
        return len(self.document_ids)

    def run(self, lab: Lab, methods: Sequence[str]) -> Iterator[Row]:
        # As in `LLM.logprobs`: the document's last token is the first row that predicts.
        prompt = PromptTokens((), self.document_ids[:-1], ())
        rows = [self.document_ids[-1], *self.target_ids[:-1]]
        reference_TV: Tensor | None = None
        for method in methods if methods[0] == REFERENCE else [REFERENCE, *methods]:
            prefill_s = lab.prefill(method, prompt, room=len(rows))
            logprobs_TV = lab.continuation_logprobs(rows)
            reference_TV = logprobs_TV if reference_TV is None else reference_TV
            if method not in methods:  # an earlier run has reported the reference
                continue
            yield Row(
                task=self.name,
                group=PROSE,
                length=self.length,
                method=method,
                prefill_s=prefill_s,
                logprob=_mean_logprob(logprobs_TV, self.target_ids),
                kl=_mean_kl(reference_TV, logprobs_TV),
            )


def _mean_logprob(logprobs_TV: Tensor, target_ids: Sequence[int]) -> float:
    targets_T = torch.tensor(target_ids, device=logprobs_TV.device)
    return logprobs_TV.gather(1, targets_T[:, None]).mean().item()


def _mean_kl(reference_TV: Tensor, logprobs_TV: Tensor) -> float:
    """Mean over the rows of KL(reference || other)."""
    return (reference_TV.exp() * (reference_TV - logprobs_TV)).sum(dim=-1).mean().item()
