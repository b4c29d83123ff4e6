"""Variable tracking (RULER, section 3): which variables a value reaches by assignments."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice

from apb.evaluate import words
from apb.evaluate.draft import Draft, depths
from apb.evaluate.needles import NOISE
from apb.evaluate.words import Stock
from apb.prompts.haystack import weave

_HOPS = 4
"""Assignments from one variable to the next, as in the paper: five variables in all."""
_QUESTION = "Which variables have the value {value}, directly or through other variables?"
_START = "The {number} variables with the value {value} are:"


def variable_tracking(rng: random.Random, length: int) -> Draft:
    """One chain among noise, behind a worked example with a chain of its own."""
    names = words.names(rng)
    values = [str(value) for value in rng.sample(range(10**4, 10**5), 2)]
    shown, asked = (list(islice(names, _HOPS + 1)) for _ in values)
    placed = list(zip(depths(rng, len(asked)), _chain(asked, values[1]), strict=True))
    hay = Stock(cycle(NOISE))
    head = (
        "Variables are set with VAR in the texts below. Follow each assignment to its value.\n\n"
        + "\n".join(weave(NOISE, _evenly(_chain(shown, values[0]))))
        + f"\n{_QUESTION.format(value=values[0])}\n"
        + f"{_START.format(number=_HOPS + 1, value=values[0])} {' '.join(shown)}\n\n"
    )

    def build(units: int) -> str:
        return head + "\n".join(weave(hay.take(units), placed))

    start = _START.format(number=_HOPS + 1, value=values[1])
    return Draft(build, _QUESTION.format(value=values[1]), tuple(asked), start)


def _chain(names: Sequence[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=True)]


def _evenly(sentences: Sequence[str]) -> list[tuple[float, str]]:
    return [(at / len(sentences), sentence) for at, sentence in enumerate(sentences)]


DRAFTS = {"vt": variable_tracking}
