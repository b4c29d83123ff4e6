"""Aggregation (RULER, section 3): the commonest words of a list, and of a text of made-up words."""

from __future__ import annotations

import random
from itertools import islice
from typing import NamedTuple

from apb.evaluate import words
from apb.evaluate.draft import Draft
from apb.evaluate.words import Stock

_NUM_COMMON = 10
_SHORT = 4096
"""Below so many tokens the paper's repeats would leave no room for other words."""
_ALPHA = 2.0
_ZETA_2 = 1.6449340668482264
"""The sum of 1 / k**2, so that shares of a text add up to 1."""
_NUM_CODES = 2000
_LEAST_WORDS = 120
"""The fewest for which the third and the fourth of the frequent words differ in number."""
_NUM_FREQUENT = 3
_NOISE_WORD = "..."


class Repeats(NamedTuple):
    """How often each common word occurs in a list, and each other one."""

    common: int
    other: int


def common_words(rng: random.Random, length: int) -> Draft:
    """Ten words thirty times each among words three times each; 6 and 1 in short lists.

    A worked example comes first, as in RULER's own generator: 40 words, 10 and 3 times; in short
    documents 20 words, 3 and 1 times.
    """
    if length >= _SHORT:
        num_shown, shown, repeats = 40, Repeats(10, 3), Repeats(30, 3)
    else:
        num_shown, shown, repeats = 20, Repeats(3, 1), Repeats(6, 1)
    source = words.compounds(rng)
    head = (
        "Below are numbered lists of words. Some words occur more often than others.\n\n"
        + _example(rng, list(islice(source, num_shown)), shown)
    )
    common = list(islice(source, _NUM_COMMON))
    others, seed = Stock(source), rng.random()

    def build(units: int) -> str:
        return head + _numbered(common, others.take(units), repeats, random.Random(seed))

    return Draft(build, _asked("last list"), tuple(common), _start("last list"))


def _example(rng: random.Random, chosen: list[str], repeats: Repeats) -> str:
    common, others = chosen[:_NUM_COMMON], chosen[_NUM_COMMON:]
    listed = _numbered(common, others, repeats, rng)
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(common, start=1))
    return f"{listed}\n{_asked('list')}\n{_start('list')} {answer}\n\n"


def _numbered(common: list[str], others: list[str], repeats: Repeats, rng: random.Random) -> str:
    listed = common * repeats.common + others * repeats.other
    rng.shuffle(listed)
    return "\n".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))


def _asked(where: str) -> str:
    return f"Which {_NUM_COMMON} words occur most often in the {where}?"


def _start(where: str) -> str:
    return f"The {_NUM_COMMON} words that occur most often in the {where} are:"


def frequent_words(rng: random.Random, length: int) -> Draft:
    """A text whose k-th word by number has a share of ``k**-2``; the first of them is noise."""
    vocabulary = [_NOISE_WORD, *islice(words.codes(rng), _NUM_CODES - 1)]
    seed = rng.random()

    def build(units: int) -> str:
        number = _LEAST_WORDS + units
        text: list[str] = []
        for rank, word in enumerate(vocabulary, start=1):
            text += [word] * int(number * rank**-_ALPHA / _ZETA_2)
        random.Random(seed).shuffle(text)
        return (
            f"Below is a text of made-up words. Count them, and ignore '{_NOISE_WORD}'.\n\n"
            f"{' '.join(text)}"
        )

    answers = tuple(vocabulary[1 : 1 + _NUM_FREQUENT])
    question = f"Which {_NUM_FREQUENT} made-up words occur most often in the text?"
    start = f"The {_NUM_FREQUENT} made-up words that occur most often are:"
    return Draft(build, question, answers, start)


DRAFTS = {"cwe": common_words, "fwe": frequent_words}
