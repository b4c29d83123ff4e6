"""Questions, documents and answers as token ids, from records or from plain texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from apb.corpus import CorpusFile
from apb.errors import InputError
from apb.prompts.template import build_prompt
from apb.train.questions import Pair, make_pair
from apb.train.records import record_pairs

_CHARS_PER_TOKEN = 6
"""More than prose has, so that a passage fills its length."""
_SPARE_TOKENS = 384
"""Of the length, for question, needles and answer where questions are generated."""
MIN_DOCUMENT = 64
"""Tokens; below, an eighth of a document is too little to speak of."""


class Reading(NamedTuple):
    """One pass of a model over a document and the answer to a question about it.

    The question stands before the document as well where heads are trained to know it.
    """

    ids_T: Tensor
    """int32; query, document and answer are parts of it."""
    query: slice
    """Its first occurrence."""
    document: slice
    answer: slice


class Reader:
    """Turns pairs into readings for one model."""

    def __init__(
        self, tokenizer: Any, template: Mapping[str, Any], *, length: int, query_aware: bool
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self.length, self._query_aware = length, query_aware

    def reading(self, pair: Pair) -> Reading | None:
        """``[prefix, query, document, query, answer]``; None where it is too long or too short.

        The query before the document is how APB's anchor shows it to later blocks, and Locret-Q
        trains with (arXiv 2410.01805, section 4.4).
        """
        prompt = build_prompt(self._tokenizer, pair.document, pair.question, **self._template)
        answer_ids = self._encode(pair.answer)
        before = prompt.query_ids if self._query_aware else ()
        parts: list[Sequence[int]] = [prompt.prefix_ids, before, prompt.document_ids]
        parts += [prompt.query_ids, answer_ids]
        starts = [sum(map(len, parts[:place])) for place in range(len(parts) + 1)]
        if starts[-1] > self.length or len(parts[2]) < MIN_DOCUMENT or not answer_ids:
            return None
        spans = [slice(*starts[place : place + 2]) for place in range(len(parts))]
        ids_T = torch.tensor([token for part in parts for token in part], dtype=torch.int32)
        return Reading(ids_T, spans[1 if self._query_aware else 3], spans[2], spans[4])

    def asked_about(self, text: str, rng: random.Random) -> Pair | None:
        """A question about as much of a text as leaves room for it; None for too little text."""
        ids = self._encode(text)
        if len(ids) < MIN_DOCUMENT:
            return None
        room = max(self.length - _SPARE_TOKENS, self.length // 2)
        if len(ids) > room:
            decoded: str = self._tokenizer.decode(ids[:room])
            text = decoded.rstrip("\ufffd")  # a character may have been cut
        return make_pair(text, rng)

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])


def collect(
    files: Sequence[CorpusFile], reader: Reader, *, needed: int, seed: int
) -> list[Reading]:
    """Up to `needed` readings, the same for the same files and seed, spread over the files.

    Raises:
        InputError: no file has a usable pair.
    """
    rng = random.Random(seed)
    order = list(files)
    rng.shuffle(order)
    readings: list[Reading] = []
    seen = 0
    bar = tqdm(total=needed, desc="reading data", disable=None)
    for pair in _spread(order, reader, share=-(-needed // len(order)), rng=rng):
        seen += 1
        if (reading := reader.reading(pair)) is not None:
            readings.append(reading)
            bar.update()
        if len(readings) == needed:
            break
    bar.close()
    if not readings:
        raise InputError(
            f"data= holds no usable pair: of {seen} questions none has a document of at least "
            f"{MIN_DOCUMENT} tokens that fits length={reader.length} with its answer; give other "
            "data or another length="
        )
    return readings


def _spread(
    files: Sequence[CorpusFile], reader: Reader, *, share: int, rng: random.Random
) -> Iterator[Pair]:
    """First some pairs of each file, then more of those that have them."""
    start, stop = 0, share
    while True:
        taken = 0
        for file in files:
            for found in islice(_found(file, reader.length), start, stop):
                taken += 1
                pair = reader.asked_about(found, rng) if isinstance(found, str) else found
                if pair is not None:
                    yield pair
        if not taken:
            return
        start, stop = stop, 2 * stop


def _found(file: CorpusFile, length: int) -> Iterator[Pair | str]:
    """The pairs in a file of records, or the passages of a text to ask about."""
    if file.field is None:
        for passage in file.passages(max_chars=_CHARS_PER_TOKEN * length):
            if isinstance(passage.content, str) and passage.content.strip():
                yield passage.content
        return
    for where, record in file.records():
        if (pairs := record_pairs(record)) is not None:
            yield from pairs
        elif isinstance(record, dict) and isinstance(record.get(file.field), str):
            yield record[file.field]
        else:
            fields = list(record)[:8] if isinstance(record, dict) else type(record).__name__
            raise InputError(
                f"{where} has neither a document with question and answer, nor messages, nor text "
                f"in {file.field!r} (its fields: {fields}): give other records or name the text "
                "with field="
            )
