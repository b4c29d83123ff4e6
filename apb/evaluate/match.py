"""How answers are scored: strings that have to occur in them, or words they share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_LETTERS = "ABCDEFGHIJ"


def match_all(text: str, answers: Sequence[str]) -> float:
    """The share of `answers` that occur in `text`, in any case of letters (RULER, section 3)."""
    return sum(_occurs(answer, text) for answer in answers) / len(answers)


def match_part(text: str, answers: Sequence[str]) -> float:
    """1 if any of `answers` occurs in `text`, in any case of letters, else 0 (RULER, section 3)."""
    return float(any(_occurs(answer, text) for answer in answers))


def lettered(options: Sequence[str]) -> dict[str, str]:
    """The options of a question, each by its letter."""
    return dict(zip(_LETTERS, options, strict=False))


def match_option(text: str, answers: Sequence[str], *, options: Sequence[str]) -> float:
    """1 if `text` begins with the letter of a right one of `options`, or holds its words, else 0.

    `answers` may be letters or options.
    """
    by_letter = lettered(options)
    right = [by_letter.get(answer.strip().upper(), answer) for answer in answers]
    # "A." and "(A)", but not the article of "A house".
    first = re.match(rf"\W*([{_LETTERS}])(?:[^\w\s]|\s*$)", text)
    if first and first[1] in by_letter:
        return float(by_letter[first[1]] in right)
    return match_part(text, right)


def word_f1(text: str, answers: Sequence[str]) -> float:
    """F1 of the words of `text` against the best of `answers` (SQuAD, and LongBench's QA tasks).

    Case, punctuation and English articles do not count.
    """
    return max(_f1(_words(text), _words(answer)) for answer in answers)


def _occurs(answer: str, text: str) -> bool:
    return answer.lower() in text.lower()


def _words(text: str) -> Counter[str]:
    plain = re.sub(r"[^\w\s]", "", text.lower())
    return Counter(word for word in plain.split() if word not in ("a", "an", "the"))


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total()) if common else 0.0
