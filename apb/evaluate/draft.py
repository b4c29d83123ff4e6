"""What tasks are made of: a document that can grow, a question, right answers, and their score."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from apb.evaluate.fit import Build, Encode, check_fits, fit

T = TypeVar("T")


class Draft(NamedTuple):
    """A document that has no length yet, and what is asked about it."""

    build: Build
    question: str
    answers: tuple[str, ...]
    answer_start: str = ""
    """How the answer begins: the model goes on from it."""


class Sample(NamedTuple):
    """A document of a certain length, and what is asked about it."""

    document: str
    document_ids: list[int]
    question: str
    answers: tuple[str, ...]
    answer_start: str = ""


Score = Callable[[str, Sequence[str]], float]
"""An answer and the right ones to a number from 0 to 1."""


class Source(random.Random):
    """What a sample is drawn from: the same for the same task, length, seed and index."""

    def __init__(self, name: str, length: int, seed: int, index: int) -> None:
        super().__init__(f"{name} {length} {seed} {index}")
        self._samples, self._index = f"{name} {length} {seed}", index

    def in_turn(self, things: Sequence[T]) -> T:
        """One of few things: the samples of a task take all of them before any comes again."""
        turn, place = divmod(self._index, len(things))
        order = random.Random(f"{self._samples} turn {turn}").sample(things, len(things))
        return order[place]


class Task(NamedTuple):
    """How samples are made and judged.

    Attributes:
        draft: from a source and the wanted number of tokens.
        score: of an answer.
        max_tokens: of an answer.
    """

    draft: Callable[[Source, int], Draft]
    score: Score
    max_tokens: int

    def check(self, name: str, length: int, *, seed: int, encode: Encode) -> None:
        """Raises InputError if the task does not fit into `length` tokens, without filling them."""
        check_fits(self._draft(name, length, seed, 0).build, encode, length, what=name)

    def sample(self, name: str, length: int, *, seed: int, index: int, encode: Encode) -> Sample:
        """The sample that the arguments decide, on any machine, for one tokenizer.

        Raises:
            InputError: the task does not fit into `length` tokens.
        """
        draft = self._draft(name, length, seed, index)
        text, ids = fit(draft.build, encode, length, what=name)
        return Sample(text, ids, draft.question, draft.answers, draft.answer_start)

    def _draft(self, name: str, length: int, seed: int, index: int) -> Draft:
        return self.draft(Source(name, length, seed, index), length)


def depths(rng: random.Random, number: int) -> list[float]:
    """Places in a document, from 0 (its beginning) to 1, in reading order."""
    return sorted(rng.random() for _ in range(number))
