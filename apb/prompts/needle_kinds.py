"""The kinds of needles: which sentences go into the haystack, what is asked, what is right."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

# The wording is tuned on a 135M model: the question repeats the words of the needle.
_FACT = "The special magic number for {key} is {number}."
_FACT_QUESTION = "What is the special magic number for {key}? Answer with the number only."
_CHAIN_QUESTION = (
    "In the text, variables are set with VAR. Which variables have the value {value}, directly or "
    "through another variable? Answer with the names of the variables only."
)
_KEYS = (
    "Athens", "Boston", "Cairo", "Delhi", "Dublin", "Havana", "Kyoto", "Lima", "Lisbon",
    "Nairobi", "Oslo", "Quebec", "Seoul", "Tunis", "Vienna", "Warsaw",
)  # fmt: skip
_NUM_KEYS = 4
_CHAIN_LEN = 4
_NAME_LEN = 5


class Needles(NamedTuple):
    """What is hidden, in reading order, and what is asked about it."""

    placed: list[tuple[float, str]]
    """Depth (0 to 1, not falling) and sentence."""
    question: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...]


def _facts(rng: random.Random, depth: float | None, num_keys: int) -> Needles:
    """One fact per key; the first is asked for."""
    keys = rng.sample(_KEYS, num_keys)
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), num_keys)]
    depths = [rng.random() for _ in keys]
    if depth is not None:
        depths[0] = depth
    pairs = zip(keys, numbers, strict=True)
    facts = [_FACT.format(key=key, number=number) for key, number in pairs]
    placed = sorted(zip(depths, facts, strict=True))
    return Needles(placed, _FACT_QUESTION.format(key=keys[0]), (numbers[0],), tuple(numbers[1:]))


def _single(rng: random.Random, depth: float | None) -> Needles:
    return _facts(rng, depth, 1)


def _multi_key(rng: random.Random, depth: float | None) -> Needles:
    return _facts(rng, depth, _NUM_KEYS)


def _variable_tracing(rng: random.Random, depth: float | None) -> Needles:
    """Two chains of assignments, each in order, scattered over the document; `depth` is unused."""
    names = _names(rng, 2 * _CHAIN_LEN)
    traced, other = names[:_CHAIN_LEN], names[_CHAIN_LEN:]
    value, other_value = rng.sample(range(10**4, 10**5), 2)
    placed = sorted(_chain(rng, traced, value) + _chain(rng, other, other_value))
    return Needles(placed, _CHAIN_QUESTION.format(value=value), traced, (*other, str(other_value)))


def _chain(rng: random.Random, names: tuple[str, ...], value: int) -> list[tuple[float, str]]:
    values = (str(value), *(f"VAR {name}" for name in names[:-1]))
    depths = sorted(rng.random() for _ in names)
    sentences = [f"VAR {name} = {word}." for name, word in zip(names, values, strict=True)]
    return list(zip(depths, sentences, strict=True))


def _names(rng: random.Random, count: int) -> tuple[str, ...]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=_NAME_LEN))] = None
    return tuple(names)


KINDS: Mapping[str, Callable[[random.Random, float | None], Needles]] = {
    "single": _single,
    "multi_key": _multi_key,
    "variable_tracing": _variable_tracing,
}
"""Name to maker, which takes the random source and the depth of the asked sentence, if given."""
