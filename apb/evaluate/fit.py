"""Texts of a wanted number of tokens.

A text is tokenised in pieces that begin with a space, where tokenizers begin a word, so that its
tokens are those of its pieces one after another. Lengths then add up, and some of the pieces tell
how long a whole text will be: a search for the right length reads little of it more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from apb.errors import InputError

Encode = Callable[[str], list[int]]
"""Text to token ids, without anything around them."""
Build = Callable[[int], str]
"""A text with that many units of filler in it."""

_PIECE_CHARS = 4096
_SAMPLED = 8
"""Pieces that an estimate reads at least; a text of fewer than twice as many is read whole."""
_SHORTFALL = 0.01
"""Of the wanted length, at most."""
_MARGIN = 0.004
"""Aimed below the wanted length where lengths are estimates."""
_FIRST_UNITS = 32
_FILLER = "The barn is red. The hay is dry. The well is deep. The lane is long. The hill is far. "


class Fitted(NamedTuple):
    """A text and its tokens."""

    text: str
    ids: list[int]


def encode_pieces(encode: Encode, text: str) -> list[int]:
    """The tokens of a text, piece by piece."""
    return list(chain.from_iterable(map(encode, _pieces(text))))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = text.rfind(" ", start + 1, start + _PIECE_CHARS)
        cut = cut if cut > start else start + _PIECE_CHARS
        yield text[start:cut]
        start = cut
    yield text[start:]


def fit(build: Build, encode: Encode, length: int, *, what: str) -> Fitted:
    """The text that comes at most 1 % below `length` tokens and never above.

    As many units as fit go in, and sentences of no meaning behind them where a unit is too large a
    step. What `build` gives has to grow with the number of units; errors call it `what`.

    Raises:
        InputError: the text without any filler is longer already.
    """
    least = check_fits(build, encode, length, what=what)
    limit = length
    while True:
        text = build(_search(build, encode, least, limit))
        ids = encode_pieces(encode, text)
        if len(ids) <= length:
            break
        limit -= len(ids) - length  # an estimate was too low
    if len(ids) < (1 - _SHORTFALL) * length:
        closing = _closing(encode, length - len(ids))
        text, ids = text + closing, ids + encode(closing)
    return Fitted(text, ids)


def check_fits(build: Build, encode: Encode, length: int, *, what: str) -> int:
    """Tokens of the text without filler; raises InputError if they are more than `length`."""
    least = len(encode_pieces(encode, build(0)))
    if least > length:
        raise InputError(
            f"lengths={length} cannot hold {what}, which needs {least} tokens with this tokenizer: "
            "raise it or leave the task out"
        )
    return least


def _search(build: Build, encode: Encode, least: int, limit: int) -> int:
    """The number of units whose text comes closest to `limit` tokens from below."""
    low, low_len = 0, float(least)
    high: int | None = None
    units = _FIRST_UNITS
    while True:
        found = _estimate(encode, build(units))
        aim = limit * (1 - _MARGIN) if found.is_estimate else limit
        if found.length > aim:
            high, high_len = units, found.length
        else:
            low, low_len = units, found.length
            if found.is_estimate and low_len >= aim * (1 - _MARGIN):
                return low
        if high == low + 1:
            return low
        if high is None:
            per_unit = max(1e-3, (low_len - least) / low)
            units = low + max(1, min(round((aim - low_len) / per_unit), 64 * low))
        else:
            share = (aim - low_len) / (high_len - low_len)
            units = low + min(high - low - 1, max(1, round(share * (high - low))))


class _Length(NamedTuple):
    length: float
    is_estimate: bool


def _estimate(encode: Encode, text: str) -> _Length:
    """How many tokens a text has, by evenly spread pieces of a long one."""
    parts = list(_pieces(text))
    stride = max(1, min(len(parts) // _SAMPLED, 16))
    read = parts[stride // 2 :: stride]
    tokens = sum(len(encode(part)) for part in read)
    if stride == 1:
        return _Length(tokens, is_estimate=False)
    return _Length(tokens * len(text) / sum(map(len, read)), is_estimate=True)


def _closing(encode: Encode, room: int) -> str:
    """As much filler as `room` tokens hold, cut at a word or, if that is too coarse, anywhere."""
    text = "\n\n" + _FILLER * (1 + room * 8 // len(_FILLER))
    words = [at for at, char in enumerate(text) if at > 2 and not char.isalnum()]
    by_words = _longest(encode, text, words, room)
    by_chars = _longest(encode, text, range(len(by_words), len(by_words) + 12), room)
    return max(by_words, by_chars, key=len)


def _longest(encode: Encode, text: str, cuts: Sequence[int], room: int) -> str:
    """The longest beginning, up to one of the `cuts`, that `room` tokens hold."""
    low, high = -1, len(cuts)
    while high - low > 1:
        middle = (low + high) // 2
        if len(encode(text[: cuts[middle]])) <= room:
            low = middle
        else:
            high = middle
    return text[: cuts[low]] if low >= 0 else ""
