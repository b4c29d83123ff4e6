"""Questions about a text that are made out of the text itself, with their answers."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from apb.prompts.needle_kinds import KINDS

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[A-Za-z]{6,}")
_SENTENCE_CHARS = range(30, 300)
"""Of sentences that are asked for: shorter ones recur, longer ones are often no sentences."""
_CONTINUATION_CHARS = 500
_CONTINUE = ("Continue the text above.", "What comes next?", "How does the text go on?")
_AFTER = 'Which sentence of the text comes right after this one: "{sentence}"'
_QUOTE = 'Quote the sentence of the text that has the word "{word}" in it.'
_GAP = 'Which word is missing in this sentence of the text: "{sentence}" Quote the whole sentence.'


class Pair(NamedTuple):
    """A question that a document answers."""

    document: str
    question: str
    answer: str


def make_pair(text: str, rng: random.Random) -> Pair | None:
    """A question of a random kind; None for a text that gives none, such as a table of numbers.

    A third ask for a needle hidden in the text (a number under a name, or a chain of
    variables); the others ask for what the text says: the sentence with a word that occurs once,
    the sentence with a gap, the sentence after another one, and how the text goes on.
    """
    kinds = list(_MAKERS)
    rng.shuffle(kinds)
    return next((pair for kind in kinds if (pair := _MAKERS[kind](text, rng))), None)


def _needle(text: str, rng: random.Random) -> Pair | None:
    needles = KINDS[rng.choice(("single", "multi_key"))](rng, None)
    asked = next(sentence for _, sentence in needles.placed if needles.answers[0] in sentence)
    return Pair(_hide(needles.placed, text), needles.question, asked)


def _tracing(text: str, rng: random.Random) -> Pair | None:
    needles = KINDS["variable_tracing"](rng, None)
    return Pair(_hide(needles.placed, text), needles.question, ", ".join(needles.answers))


def _hide(placed: Sequence[tuple[float, str]], text: str) -> str:
    """Put sentences between those of a text, at their depths."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] or [len(text)]
    parts, done = [], 0
    for depth, sentence in placed:
        at = ends[min(int(depth * len(ends)), len(ends) - 1)]
        parts += [text[done:at], sentence, " "]
        done = at
    return "".join([*parts, text[done:]])


def _quote(text: str, rng: random.Random) -> Pair | None:
    if (found := _rare_word(text, rng)) is None:
        return None
    word, sentence = found
    return Pair(text, _QUOTE.format(word=word), sentence)


def _gap(text: str, rng: random.Random) -> Pair | None:
    if (found := _rare_word(text, rng)) is None:
        return None
    word, sentence = found
    return Pair(text, _GAP.format(sentence=sentence.replace(word, "____")), sentence)


def _rare_word(text: str, rng: random.Random) -> tuple[str, str] | None:
    """A word that the text has once, and its sentence."""
    counts = Counter(word.lower() for word in _WORD.findall(text))
    found = [
        (word, sentence)
        for sentence in _sentences(text)
        for word in _WORD.findall(sentence)
        if counts[word.lower()] == 1
    ]
    return rng.choice(found) if found else None


def _after(text: str, rng: random.Random) -> Pair | None:
    found = [pair for pair in pairwise(_sentences(text)) if " ".join(pair) in text]
    if not found:
        return None
    sentence, following = rng.choice(found)
    return Pair(text, _AFTER.format(sentence=sentence), following)


def _sentences(text: str) -> list[str]:
    """Those of usable length, in order."""
    return [
        sentence
        for sentence in (part.strip() for part in _SENTENCE_END.split(text))
        if len(sentence) in _SENTENCE_CHARS and "\n" not in sentence
    ]


def _continuation(text: str, rng: random.Random) -> Pair | None:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    late = [end for end in ends if 0.8 * len(text) <= end <= len(text) - _SENTENCE_CHARS.start]
    if not late:
        return None
    at = rng.choice(late)
    return Pair(text[:at].rstrip(), rng.choice(_CONTINUE), text[at : at + _CONTINUATION_CHARS])


_MAKERS: Mapping[str, Callable[[str, random.Random], Pair | None]] = {
    "needle": _needle,
    "tracing": _tracing,
    "quote": _quote,
    "gap": _gap,
    "after": _after,
    "continuation": _continuation,
}
