"""What a user may want of a text, for a model to answer."""

from __future__ import annotations

import random
import re

_OF_TEXT = (
    "Summarize the text above.",
    "Summarize the text above in one sentence.",
    "What is this text about?",
    "List the main points.",
    "Explain this in simple words.",
    "Rewrite the text above in your own words.",
    "Continue the text above.",
    "What can be learned from this?",
    "Which sentence of the text is the most important one? Quote it.",
    "Write three questions about this text and answer them.",
)
_OF_WORD = (
    "What does the text say about {word}?",
    "Why is {word} mentioned?",
    "Quote what the text says about {word}.",
    "Who or what is {word}?",
    "Answer from the text: what about {word}?",
)
_OF_OPENING = 'Copy the part of the text above that begins with "{opening}", word for word.'
_ALONE = (
    "What is it?",
    "Explain what this means.",
    "Who was involved, and when?",
    "Tell me more.",
    "Give an example.",
)
_WORD = re.compile(r"[A-Za-z][A-Za-z-]{4,}")
_OPENING_WORDS = 8


def make_request(text: str, rng: random.Random) -> tuple[str, str]:
    """A document and a question of a random kind about it.

    A third ask about the text as a whole, a third about a word in it, and a sixth each for a copy
    of a part and about a word without the text, as users do who ask out of the blue.
    """
    words = _WORD.findall(text) or ["this"]
    kind = rng.randrange(6)
    if kind < 2:
        return text, rng.choice(_OF_TEXT)
    if kind < 4:
        return text, rng.choice(_OF_WORD).format(word=rng.choice(words))
    if kind == 4:
        spaced = text.split()
        start = rng.randrange(max(1, len(spaced) // 2))
        opening = " ".join(spaced[start : start + _OPENING_WORDS])
        return text, _OF_OPENING.format(opening=opening)
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.randint(1, 3)]), rng.choice(_ALONE)
