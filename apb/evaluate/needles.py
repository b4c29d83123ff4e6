"""Needles in a haystack: RULER's eight retrieval tasks, and InfiniteBench's key retrieval.

After Hsieh et al. 2024 (arXiv 2404.06654), section 3 and the table of its appendix that names the
thirteen tasks, and Zhang et al. 2024 (arXiv 2402.13718), Retrieve.KV. The words are our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import NamedTuple

from apb.evaluate import words
from apb.evaluate.draft import Draft, depths
from apb.evaluate.words import Stock
from apb.prompts.haystack import chronicle, paragraphs, weave

NOISE = ("The barn is red.", "The hay is dry.", "The well is deep.", "The lane is long.")
_HEAD = (
    "Special magic {what}s are hidden in the text below. Remember them: you will be asked for "
    "them afterwards.\n\n"
)
_FACT = "The special magic {what} for {key} is {value}."
_ONE_OF = "One of the special magic {what}s for {key} is {value}."

Words = Callable[[random.Random], Iterator[str]]


class Hunt(NamedTuple):
    """What is hidden in what.

    Attributes:
        hay: `noise` (a few sentences over and over), `essay` (running text without a repeat) or
            `needles` (facts of the same form as those asked for).
        keys, values: where they come from.
        num_keys: facts with different keys among the hay, those asked for included.
        num_values: facts with the same key.
        num_queries: keys asked for.
    """

    hay: str
    keys: Words = words.keys
    values: Words = words.numbers
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


HUNTS = {
    "niah_single_1": Hunt("noise"),
    "niah_single_2": Hunt("essay"),
    "niah_single_3": Hunt("essay", values=words.uuids),
    "niah_multikey_1": Hunt("essay", num_keys=4),
    "niah_multikey_2": Hunt("needles"),
    "niah_multikey_3": Hunt("needles", keys=words.uuids, values=words.uuids),
    "niah_multivalue": Hunt("essay", num_values=4),
    "niah_multiquery": Hunt("essay", num_keys=4, num_queries=4),
}
"""RULER's settings."""


def hunt(rng: random.Random, length: int, *, settings: Hunt) -> Draft:
    """A draft of one of `HUNTS`."""
    what = "uuid" if settings.values is words.uuids else "number"
    keys, values = settings.keys(rng), settings.values(rng)
    fact = _FACT if settings.num_values == 1 else _ONE_OF
    asked = [next(keys) for _ in range(settings.num_keys)]
    facts = [(key, next(values)) for key in asked for _ in range(settings.num_values)]
    rng.shuffle(facts)
    hidden = [fact.format(what=what, key=key, value=value) for key, value in facts]
    placed = list(zip(depths(rng, len(hidden)), hidden, strict=True))
    queried = asked[: settings.num_queries]
    answers = tuple(value for key, value in facts if key in queried)
    hay: Stock[str]
    if settings.hay == "noise":
        hay = Stock(cycle(NOISE))
    elif settings.hay == "essay":
        hay = Stock(chronicle(rng))
    else:
        others = zip(keys, values, strict=False)
        hay = Stock(_FACT.format(what=what, key=key, value=value) for key, value in others)
    join = paragraphs if settings.hay == "essay" else "\n".join

    def build(units: int) -> str:
        return _HEAD.format(what=what) + join(weave(hay.take(units), placed))

    wanted = _listed(queried)
    if len(answers) == 1:
        question = f"What is the special magic {what} for {wanted}?"
        return Draft(build, question, answers, f"The special magic {what} for {wanted} is")
    question = f"What are all the special magic {what}s for {wanted} in the text?"
    return Draft(build, question, answers, f"The special magic {what}s for {wanted} are")


def key_retrieval(rng: random.Random, length: int) -> Draft:
    """One value out of a JSON object whose keys and values are random UUIDs."""
    pairs = zip(words.uuids(rng), words.uuids(rng), strict=False)
    key, value = next(pairs)
    placed = [(rng.random(), f'"{key}": "{value}"')]
    hay = Stock(f'"{other}": "{its}"' for other, its in pairs)

    def build(units: int) -> str:
        lines = ",\n".join(weave(hay.take(units), placed))
        return f"A JSON object follows. Look up the value of a key in it.\n\n{{{lines}}}"

    question = f'What is the value of the key "{key}" in the JSON object?'
    return Draft(build, question, (value,), f'The value of the key "{key}" is "')


def _listed(items: Sequence[str]) -> str:
    """As one says it: a, b and c."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


DRAFTS: Mapping[str, Callable[[random.Random, int], Draft]] = {
    **{name: partial(hunt, settings=settings) for name, settings in HUNTS.items()},
    "kv_retrieval": key_retrieval,
}
