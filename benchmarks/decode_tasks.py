"""The prompts of the decoding benchmark: Spec-Bench, and questions whose answers quote."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from apb.errors import InputError
from apb.evaluate.prose import PASSAGES
from apb.prompts.haystack import chronicle

SPEC_BENCH = ("summarization", "rag", "qa")
QUOTING = "quoting"
_QUERY_TOKENS = 8
_WRITERS = ("the miller", "Agnes", "the council", "Tobias", "the bishop", "Elsa", "the surveyor")
_LETTER_SENTENCES = 4


class Task(NamedTuple):
    """One prompt as token ids; the last few are the question, read after the prefill."""

    category: str
    name: str
    context_ids: tuple[int, ...]
    query_ids: tuple[int, ...]


def read_tasks(
    spec_bench: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    quoting: int,
    document_chars: int,
) -> list[Task]:
    """`samples` prompts of each Spec-Bench category, evenly spread, and `quoting` long ones.

    Without `samples` the file is not read.

    Raises:
        InputError: the file is not there or is something else.
    """
    spoken = _spec_bench(spec_bench, samples) if samples else ()
    texts = [*spoken, *_quoting(quoting, document_chars)]
    return [_task(text, tokenizer) for text in texts]


class _Text(NamedTuple):
    category: str
    name: str
    user: str
    answer_start: str = ""


def _spec_bench(path: Path, samples: int) -> Iterator[_Text]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for category in SPEC_BENCH:
            of_category = [row for row in rows if row["category"] == category]
            for row in of_category[:: max(1, len(of_category) // samples)][:samples]:
                yield _Text(category, f"{category} {row['question_id']}", row["turns"][0])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no Spec-Bench question file: {error}") from error


def _quoting(count: int, document_chars: int) -> Iterator[_Text]:
    """Documents of prose with a letter in them, and the request to quote it.

    The answer begins with what introduces the letter: this small model seldom quotes unless it has
    begun to.
    """
    sentences = chronicle(random.Random(0))
    for number in range(count):
        name, passage = list(PASSAGES.items())[number % len(PASSAGES)]
        opening = f'The letter of {_WRITERS[number % len(_WRITERS)]} says: "'
        letter = opening + " ".join(islice(sentences, _LETTER_SENTENCES)) + '"'
        paragraphs = passage()[:document_chars].split("\n\n")
        paragraphs.insert(len(paragraphs) * (number % 4 + 1) // 5, letter)
        text = "\n\n".join(paragraphs)
        request = f"What does the letter of {_WRITERS[number % len(_WRITERS)]} say? Quote it."
        yield _Text(QUOTING, f"{QUOTING} {name} {number}", f"{text}\n\n{request}", opening)


def _task(text: _Text, tokenizer: PreTrainedTokenizerBase) -> Task:
    chat = [{"role": "user", "content": text.user}]
    markup = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    shown = f"{markup}{text.answer_start}"
    ids: list[int] = tokenizer(shown, add_special_tokens=False)["input_ids"]
    return Task(text.category, text.name, tuple(ids[:-_QUERY_TOKENS]), tuple(ids[-_QUERY_TOKENS:]))
