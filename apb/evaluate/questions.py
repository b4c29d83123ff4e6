"""Questions about one passage among many (RULER, section 3: `qa_1`), or about two (`qa_2`).

The paper takes both from SQuAD and HotpotQA. These passages and questions are our own, beside this
file; where they do not fill the length, pages of the chronicle do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from apb.evaluate.draft import Draft, Source, depths
from apb.evaluate.words import Stock
from apb.prompts.haystack import chronicle, weave

_FILE = Path(__file__).with_name("passages.json")
_HEAD = "Answer the question that follows the documents. Give only the answer.\n\n"
_SENTENCES = 5
"""Of a page, which makes it about as long as a passage."""


class Question(NamedTuple):
    """What is asked, right answers, and the titles of the passages that hold them."""

    text: str
    answers: tuple[str, ...]
    titles: tuple[str, ...]


class Library(NamedTuple):
    """What is packaged.

    Attributes:
        passages: text by title.
        single: questions that one passage answers.
        double: questions whose first passage names what the second one answers about.
    """

    passages: Mapping[str, str]
    single: tuple[Question, ...]
    double: tuple[Question, ...]


@cache
def library() -> Library:
    data: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    single = [
        Question(asked["question"], tuple(asked["answers"]), (passage["title"],))
        for passage in data["passages"]
        for asked in passage["questions"]
    ]
    double = [
        Question(asked["question"], tuple(asked["answers"]), tuple(asked["passages"]))
        for asked in data["two_hops"]
    ]
    texts = {passage["title"]: passage["text"] for passage in data["passages"]}
    return Library(texts, tuple(single), tuple(double))


def one_passage(rng: Source, length: int) -> Draft:
    return _draft(rng, rng.in_turn(library().single))


def two_passages(rng: Source, length: int) -> Draft:
    return _draft(rng, rng.in_turn(library().double))


def _draft(rng: random.Random, question: Question) -> Draft:
    texts = library().passages
    needed = [_page(title, texts[title]) for title in question.titles]
    rng.shuffle(needed)
    placed = list(zip(depths(rng, len(needed)), needed, strict=True))
    others = [_page(title, text) for title, text in texts.items() if title not in question.titles]
    rng.shuffle(others)
    hay = Stock(chain(others, _pages(chronicle(rng))))

    def build(units: int) -> str:
        pages = weave(hay.take(units), placed)
        numbered = (f"Document {number}: {page}" for number, page in enumerate(pages, start=1))
        return _HEAD + "\n\n".join(numbered)

    return Draft(build, f"Question: {question.text}", question.answers, "Answer:")


def _page(title: str, text: str) -> str:
    return f"{title}\n{text}"


def _pages(sentences: Iterator[str]) -> Iterator[str]:
    number = 0
    while page := " ".join(islice(sentences, _SENTENCES)):
        number += 1
        yield _page(f"Village chronicle, page {number}", page)


DRAFTS = {"qa_1": one_passage, "qa_2": two_passages}
