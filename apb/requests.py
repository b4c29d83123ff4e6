"""Requests as they come in, turned into tokens and checked before any rank communicates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from apb.config import RunConfig
from apb.errors import InputError
from apb.hf.tokenizer import load_tokenizer
from apb.prompts.answer import AnswerText
from apb.prompts.base import PromptTokens
from apb.prompts.encode import (
    checked_ids,
    control_tokens,
    encode_plain,
    split_start,
    start_ids,
)
from apb.prompts.needle import make_needle
from apb.prompts.template import build_prompt
from apb.sampling import SamplingParams

Given = str | list[int]
"""Text, or token ids."""


class Question(NamedTuple):
    """A prompt to answer, and how."""

    prompt: PromptTokens
    sampling: SamplingParams

    @property
    def room(self) -> int:
        """New tokens that have to be cached beside the context."""
        return len(self.prompt.query_ids) + self.sampling.max_tokens


class Continuation(NamedTuple):
    """A context, the rows to run after it, and the token that each row should predict."""

    prompt: PromptTokens
    rows: list[int]
    targets: list[int]
    reread: int
    """Tokens of the context that are among the rows: a document of one token is both."""

    @property
    def room(self) -> int:
        """New tokens that have to be cached beside the context."""
        return len(self.rows)


class RequestReader:
    """Checks requests against the model's tokenizer and positions."""

    def __init__(self, config: RunConfig, *, max_positions: int) -> None:
        self._config = config
        self._max_positions = max_positions
        self.tokenizer = load_tokenizer(config.model)

    def question(
        self, document: Given, question: Given, params: dict[str, Any], answer_start: str = ""
    ) -> Question:
        """A question about a document; the answer goes on from `answer_start`.

        Raises:
            InputError: empty, too long, or sampling settings out of range.
        """
        prompt = build_prompt(
            self.tokenizer,
            document,
            question,
            **self._config.model.prompt_settings,
            answer_start=answer_start,
        )
        sampling = SamplingParams(**params)
        max_tokens = self._max_tokens(prompt, sampling.max_tokens)
        return Question(prompt, replace(sampling, max_tokens=max_tokens))

    def answer(self, sampling: SamplingParams, eos_ids: Iterable[int]) -> AnswerText:
        """The text of a question's answer, which grows token by token."""
        stop_ids = (*(() if sampling.ignore_eos else eos_ids), *sampling.stop_token_ids)
        return AnswerText(self.tokenizer, stop=sampling.stop, stop_ids=stop_ids)

    def continuation(
        self, document: Given, continuation: Given, query: Given | None
    ) -> Continuation:
        """A continuation to score; `query` only steers the anchor.

        Raises:
            InputError: empty or too long.
        """
        document_ids = self._raw_ids(document, "document", at_start=True)
        targets = self._raw_ids(continuation, "continuation")
        steer = [] if query is None else self._raw_ids(query, "query")
        length = len(document_ids) + len(targets) - 1
        self._check_length(length, len(targets) - 1, "continuation")
        # The last document token is the first row that predicts; the context precedes it.
        reread = 1 if len(document_ids) == 1 else 0
        prefix, shown = split_start(self.tokenizer, document_ids[:-1] or document_ids)
        prompt = PromptTokens(tuple(prefix), tuple(shown), tuple(steer))
        return Continuation(prompt, [document_ids[-1], *targets[:-1]], targets, reread)

    def needle(self, *, context_len: int, **arguments: Any) -> dict[str, str]:
        """A document around a fact, which the model can read, with question and answer."""
        if context_len > self._max_positions and not self._config.allow_beyond_context:
            raise InputError(
                f"context_len={context_len} exceeds the {self._max_positions} tokens that the "
                "model reads: lower prompt.context_len or set allow_beyond_context=true"
            )
        case = make_needle(self.count_tokens, context_len=context_len, **arguments)
        return {"document": case.document, "question": case.question, "answer": case.answer}

    def count_tokens(self, text: str) -> int:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(list(ids))

    def _raw_ids(self, part: Given, name: str, *, at_start: bool = False) -> list[int]:
        """Token ids without a template; text at the start gets what the tokenizer begins with."""
        if isinstance(part, str):
            controls = control_tokens(self.tokenizer, "")
            ids = start_ids(self.tokenizer) if at_start else []
            ids += encode_plain(self.tokenizer, part, controls=controls, name=name)
        else:
            ids = checked_ids(part, vocab_size=len(self.tokenizer), name=name)
        if not ids:
            raise InputError(f"the {name} is empty; give at least one token")
        return ids

    def _max_tokens(self, prompt: PromptTokens, max_tokens: int) -> int:
        """How many tokens can be generated: `max_tokens`, or what the model's positions leave."""
        used = len(prompt.context_ids) + len(prompt.query_ids)
        self._check_length(used + 1, used - len(prompt.document_ids) + 1, "question and template")
        if self._config.allow_beyond_context:
            return max_tokens
        return min(max_tokens, self._max_positions - used)

    def _check_length(self, length: int, reserved: int, what: str) -> None:
        limit = self._max_positions
        if length > limit and not self._config.allow_beyond_context:
            raise InputError(
                f"the prompt has {length} tokens and the model reads at most {limit}: shorten the "
                f"document to {max(0, limit - reserved)} tokens ({what} need {reserved}) or set "
                "allow_beyond_context=true"
            )
