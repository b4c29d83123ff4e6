"""What a drafting head learns from: the target's own answers, and texts, also as answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from apb.corpus import CorpusFile
from apb.errors import InputError
from apb.prompts.encode import checked_ids
from apb.prompts.template import build_prompt

_CHARS_PER_TOKEN = 6
"""More than prose has, so that a passage fills its lesson."""
_CONTINUE = ("Continue the text above.", "What comes next?", "Write on in the same style.")
_QUOTE = (
    "Quote the text above word for word.",
    "Repeat the text above.",
    "Copy the part of the text above that answers the question.",
)


class Lesson(NamedTuple):
    """Token ids, and the place from which on they are to be drafted."""

    ids: list[int]
    first: int = 0


def answered_lessons(
    files: Sequence[CorpusFile], *, vocab_size: int, max_tokens: int
) -> Iterator[Lesson]:
    """The target's own answers, each behind its prompt: the records of `apb.train answers`.

    Prompt and answer together are cut to `max_tokens`, at their end.

    Raises:
        InputError: a record without lists of ids under ``prompt_ids`` and ``token_ids``.
    """
    for where, record in chain.from_iterable(file.records() for file in files):
        fields = record if isinstance(record, dict) else {}
        parts: list[Any] = [fields.get(name) for name in ("prompt_ids", "token_ids")]
        if not all(isinstance(part, list) for part in parts):
            raise InputError(
                f"{where} has no prompt_ids and token_ids: generations= are records of "
                "`python -m apb.train answers`"
            )
        prompt_ids, answer_ids = (
            checked_ids(part, vocab_size=vocab_size, name=f"record {where}") for part in parts
        )
        lesson = Lesson([*prompt_ids, *answer_ids][:max_tokens], len(prompt_ids))
        if lesson.first < len(lesson.ids):
            yield lesson


def make_lessons(
    files: Sequence[CorpusFile],
    tokenizer: Any,
    template: Mapping[str, Any],
    *,
    length: int,
    seed: int,
) -> Iterator[Lesson]:
    """Sequences of `length` token ids, the same for the same files and seed.

    A third each are prose as it stands, prose as the continuation that a user has asked for, and a
    passage that is quoted back. Lists of ids in records are cut to length. Whatever does not fill a
    lesson is left out.
    """
    rng = random.Random(seed)
    order = list(files)
    rng.shuffle(order)
    for file in order:
        for passage in file.passages(max_chars=_CHARS_PER_TOKEN * length):
            ids = passage.content
            if isinstance(ids, str):
                plain = tokenizer(ids, add_special_tokens=False, split_special_tokens=True)
                ids = _lesson(plain["input_ids"], tokenizer, template, length, rng)
            if len(ids) >= length:
                yield Lesson(ids[:length])


def _lesson(
    ids: list[int], tokenizer: Any, template: Mapping[str, Any], length: int, rng: random.Random
) -> list[int]:
    kind = rng.randrange(3)
    if kind == 0 or len(ids) < length // 2:
        return ids
    share = length // 2 if kind == 1 else length * 2 // 5
    document = ids[:share]
    prompt = build_prompt(
        tokenizer, document, rng.choice(_CONTINUE if kind == 1 else _QUOTE), **template
    )
    answer = ids[share:] if kind == 1 else document[rng.randrange(share // 4) :]
    return [*prompt.context_ids, *prompt.query_ids, *answer]
