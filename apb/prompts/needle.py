"""Needle in a haystack: a document of a wanted length, made around a fact, and the question."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from apb.errors import InputError
from apb.prompts.haystack import chronicle, paragraphs, weave
from apb.prompts.needle_kinds import KINDS, Needles

_MAX_GROWTHS = 16


@dataclass(frozen=True, slots=True)
class NeedleCase:
    """A document, a question that only the document answers, and how to tell a right answer."""

    document: str
    question: str
    answer: str
    """The words a right answer holds, separated by `, `."""
    distractors: tuple[str, ...] = ()
    """Words of the same sort in the document that a right answer does not hold."""


def make_needle(
    count_tokens: Callable[[str], int],
    *,
    context_len: int,
    seed: int = 0,
    depth: float | None = None,
    kind: str = "single",
) -> NeedleCase:
    """Return the case that `seed` decides, its document at most one sentence below `context_len`.

    `count_tokens` is that of the model, with or without its BOS. `kind` is `single` (one number),
    `multi_key` (four numbers under different names, one asked for) or `variable_tracing` (which
    variables a value reaches by assignment, beside a second chain that it does not reach). `depth`
    is where the asked sentence stands, from 0 (first) to 1 (last), by default drawn from `seed`.

    Raises:
        InputError: an argument is out of range, or `context_len` cannot hold the needles.
    """
    if kind not in KINDS:
        raise InputError(
            f"kind={kind!r} is none of {', '.join(KINDS)}; set prompt.kind to one of them"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise InputError(f"depth={depth} is outside 0 to 1; change prompt.depth")
    if depth is not None and kind == "variable_tracing":
        raise InputError(
            f"depth={depth} has no meaning for kind='variable_tracing'; leave prompt.depth out"
        )
    rng = random.Random(seed)
    needles = KINDS[kind](rng, depth)
    document = _fill(needles, chronicle(rng), count_tokens, context_len)
    return NeedleCase(document, needles.question, ", ".join(needles.answers), needles.distractors)


def is_correct(case: NeedleCase, text: str) -> bool:
    """Whether `text` names every part of the answer and none of the distractors."""
    ungrouped = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    words = set(re.findall(r"[A-Za-z0-9]+", ungrouped))
    return words.issuperset(case.answer.split(", ")) and words.isdisjoint(case.distractors)


def _fill(
    needles: Needles, source: Iterator[str], count: Callable[[str], int], context_len: int
) -> str:
    """Weave as much of `source` around the needles as `context_len` tokens hold."""
    hay: list[str] = []
    needed = total = count(_weave(hay, needles))
    if needed > context_len:
        raise InputError(
            f"context_len={context_len} is below the {needed} tokens of the needle alone; "
            "raise prompt.context_len"
        )
    # Counts of single sentences do not add up exactly, so each round ends with one of the whole.
    for _ in range(_MAX_GROWTHS):
        added = _take(source, count, context_len - total)
        if not added:
            break
        hay += added
        total = count(_weave(hay, needles))
    while total > context_len:
        excess = total - context_len
        while excess > 0:
            excess -= count(" " + hay.pop())
        total = count(_weave(hay, needles))
    return _weave(hay, needles)


def _take(source: Iterator[str], count: Callable[[str], int], spare: int) -> list[str]:
    """Take sentences up to the first that `spare` tokens do not hold, which is lost."""
    taken = []
    for sentence in source:
        spare -= max(1, count(" " + sentence))
        if spare < 0:
            break
        taken.append(sentence)
    return taken


def _weave(hay: list[str], needles: Needles) -> str:
    return paragraphs(weave(hay, needles.placed))
