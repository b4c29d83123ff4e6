"""Samples as an LLM meets them: a question to answer, or real text to go on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import NamedTuple

from apb.errors import InputError
from apb.evaluate.draft import Sample, Score
from apb.evaluate.fit import Encode, encode_pieces
from apb.evaluate.journal import Place, Row
from apb.evaluate.match import match_option
from apb.evaluate.prose import PASSAGES
from apb.evaluate.records import Record, read_records
from apb.evaluate.settings import METRICS, Settings
from apb.evaluate.tasks import PROSE, TASKS
from apb.llm import LLM
from apb.sampling import SamplingParams

CONTINUATION_LEN = 128
"""Tokens of real text whose likelihood is measured."""


class Vocabulary(NamedTuple):
    """The model's tokenizer, as far as documents are made with it."""

    encode: Encode
    start_ids: tuple[int, ...]
    """What it puts before any text."""


@dataclass(frozen=True, slots=True)
class QuestionCase:
    """A document and a question; the answer is generated and scored."""

    sample: Sample
    score: Score
    max_tokens: int

    @property
    def digest(self) -> str:
        return _digest(self.sample.document_ids, self.sample.question)

    def run(self, llm: LLM, place: Place, method: str, params: SamplingParams) -> Row:
        output = llm.ask(
            self.sample.document_ids,
            self.sample.question,
            replace(params, max_tokens=self.max_tokens),
            answer_start=self.sample.answer_start,
        )
        return Row(
            **place._asdict(),
            method=method,
            digest=self.digest,
            tokens=len(self.sample.document_ids),
            score=self.score(output.text, self.sample.answers),
            text=output.text,
            answers=self.sample.answers,
            prefill_s=output.metrics.prefill_s,
            ttft_s=output.metrics.ttft_s,
            notes=tuple(output.metrics.notes),
            ran=f"{output.metrics.dtype} on {output.metrics.device}, {output.metrics.backend}",
        )


@dataclass(frozen=True, slots=True)
class ProseCase:
    """Real text: how likely its next tokens are, and KL to exact attention there."""

    document_ids: Sequence[int]
    continuation_ids: Sequence[int]

    @property
    def digest(self) -> str:
        return _digest([*self.document_ids, *self.continuation_ids], "")

    def run(self, llm: LLM, place: Place, method: str, params: SamplingParams) -> Row:
        found = llm.divergence(self.document_ids, self.continuation_ids)
        return Row(
            **place._asdict(),
            method=method,
            digest=self.digest,
            tokens=len(self.document_ids),
            logprob=sum(found.logprobs) / len(found.logprobs),
            kl=sum(found.kl) / len(found.kl),
        )


Case = QuestionCase | ProseCase


class Item(NamedTuple):
    """A place in the evaluation, and how its case is made, which takes time."""

    place: Place
    load: Callable[[], Case]


def items(settings: Settings, vocabulary: Vocabulary, *, max_tokens: int) -> list[Item]:
    """All samples, in such an order that the first of them are a sample of the whole.

    Args:
        max_tokens: of an answer to a question of the user's.

    Raises:
        InputError: a task does not fit a length, or a file of questions is not as it should be.
    """
    seed = settings.config.seed
    files = {path.stem: read_records(path, settings.samples) for path in settings.data}
    for name in settings.tasks:
        for length in settings.lengths:
            if name != PROSE:  # its shortest form tells, and takes no time
                TASKS[name].check(name, length, seed=seed, encode=vocabulary.encode)
    prose = None
    if PROSE in settings.tasks:
        prose = _prose(vocabulary)
        prose(Place(PROSE, settings.lengths[-1], 0))
    found: list[Item] = []
    for index in range(settings.samples):
        for length in settings.lengths:
            for name in settings.tasks:
                place = Place(name, length, index)
                if name != PROSE:
                    found.append(Item(place, partial(_question, place, seed, vocabulary.encode)))
                elif prose is not None and index < len(PASSAGES):
                    found.append(Item(place, partial(prose, place)))
        for name, records in files.items():
            if index < len(records):
                place = Place(name, settings.lengths[-1], index)
                score = _score_of(records[index], settings)
                make = partial(_given, records[index], place, vocabulary.encode, score, max_tokens)
                found.append(Item(place, make))
    return found


def _question(place: Place, seed: int, encode: Encode) -> QuestionCase:
    task = TASKS[place.task]
    sample = task.sample(place.task, place.length, seed=seed, index=place.sample, encode=encode)
    return QuestionCase(sample, task.score, task.max_tokens)


def _score_of(record: Record, settings: Settings) -> Score:
    if record.options:
        return partial(match_option, options=record.options)
    return METRICS[settings.metric]


def _given(
    record: Record, place: Place, encode: Encode, score: Score, max_tokens: int
) -> QuestionCase:
    """A question of the user's; what is too long of its document is cut out of the middle."""
    ids = encode(record.document)
    over = max(0, len(ids) - place.length)
    kept = (len(ids) - over) // 2
    ids = ids[:kept] + ids[kept + over :]
    sample = Sample(record.document, ids, record.question, record.answers)
    return QuestionCase(sample, score, max_tokens)


def _prose(vocabulary: Vocabulary) -> Callable[[Place], ProseCase]:
    """Documents out of the packaged passages, each beginning with another one."""

    @cache
    def passage(name: str) -> list[int]:
        return encode_pieces(vocabulary.encode, PASSAGES[name]() + "\n\n")

    def case(place: Place) -> ProseCase:
        names = [*PASSAGES][place.sample :] + [*PASSAGES][: place.sample]
        ids = [*vocabulary.start_ids, *chain.from_iterable(map(passage, names))]
        needed = place.length + CONTINUATION_LEN
        if len(ids) < needed:
            raise InputError(
                f"lengths={place.length} is more than the packaged prose has, which is "
                f"{len(ids) - CONTINUATION_LEN} tokens: leave tasks=prose out, or lower it"
            )
        return ProseCase(ids[: place.length], ids[place.length : needed])

    return case


def _digest(ids: Sequence[int], question: str) -> str:
    text = f"{list(ids)} {question}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
