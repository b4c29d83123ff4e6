"""The prompts of the decoding benchmark: Spec-Bench, and questions whose answers quote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from apb.errors import InputError
from apb.evaluate.prose import PASSAGES

SPEC_BENCH = ("summarization", "rag", "qa")
QUOTING = "quoting"
_QUERY_TOKENS = 8


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
    return [_task(category, name, text, tokenizer) for category, name, text in texts]


def _spec_bench(path: Path, samples: int) -> Iterator[tuple[str, str, str]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for category in SPEC_BENCH:
            of_category = [row for row in rows if row["category"] == category]
            for row in of_category[:: max(1, len(of_category) // samples)][:samples]:
                yield category, f"{category} {row['question_id']}", row["turns"][0]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no Spec-Bench question file: {error}") from error


def _quoting(count: int, document_chars: int) -> Iterator[tuple[str, str, str]]:
    """Documents of prose, and the request to copy a part of them."""
    for number in range(count):
        name, passage = list(PASSAGES.items())[number % len(PASSAGES)]
        text = passage()[:document_chars]
        start = text.find("\n\n", (len(text) // 5) * (number % 4)) + 2
        opening = " ".join(text[start : start + 200].split()[:8])
        request = f'Copy the part of the text above that begins with "{opening}", word for word.'
        yield QUOTING, f"{QUOTING} {name} {number}", f"{text}\n\n{request}"


def _task(category: str, name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    chat = [{"role": "user", "content": text}]
    markup = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(str(markup), add_special_tokens=False)["input_ids"]
    return Task(category, name, tuple(ids[:-_QUERY_TOKENS]), tuple(ids[-_QUERY_TOKENS:]))
