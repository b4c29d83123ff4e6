"""Where a document continues like the answer so far: its suffixes, sorted."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

SORTED_TOKENS = 64
"""Suffixes are in order of their first 64 tokens; what lies beyond does not matter here."""
MAX_MATCH = 32
ID_BYTES = 4
"""Of an encoded token, most significant first, so that bytes compare as tokens do."""


Text = TypeVar("Text", bytes, bytearray)
F = TypeVar("F")


class Match(NamedTuple):
    """Places in the document where the last `length` tokens stand."""

    length: int
    first: int
    last: int
    """Of the sorted suffixes, one beyond the last."""


class SuffixIndex:
    """The sorted suffixes of a token sequence (a suffix array, cut at 64 tokens).

    Built by doubling: suffixes in the order of their first k tokens are put in that of 2 k by
    sorting pairs of ranks. A lookup is a few bisections over it; comparisons are of bytes. One
    million tokens take 8 MB, and a few times that while they are sorted.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        ids = np.asarray(token_ids, dtype=np.int64)
        self._order = _sorted_suffixes(ids)
        self._bytes = encode(token_ids)
        self._ids = np.frombuffer(self._bytes, dtype=">u4")

    def __len__(self) -> int:
        return len(self._ids)

    def longest_match(self, recent_ids: Sequence[int], *, at_least: int = 1) -> Match | None:
        """The longest end of `recent_ids`, up to 32 tokens, that the document holds."""
        recent = encode(recent_ids[-MAX_MATCH:])
        return longest_end(recent, self._places, at_least=at_least, at_most=MAX_MATCH)

    def _places(self, pattern: bytes) -> Match | None:
        size = len(pattern)

        def beginning(rank: int) -> bytes:
            start = int(self._order[rank]) * ID_BYTES
            return self._bytes[start : start + size]

        ranks = range(len(self))
        first = bisect_left(ranks, pattern, key=beginning)
        last = bisect_right(ranks, pattern, lo=first, key=beginning)
        return Match(size // ID_BYTES, first, last) if first < last else None

    def continuations(self, match: Match, *, at_most: int = 256) -> list[tuple[int, Match]]:
        """The tokens that follow a match, each with the match that it extends to.

        Where there are more places than `at_most`, evenly spread ones stand for all of them.
        """
        step = max(1, -(-(match.last - match.first) // at_most))
        ranks = np.arange(match.first, match.last, step)
        places = self._order[ranks].astype(np.int64) + match.length
        inside = places < len(self)
        ranks, tokens = ranks[inside], self._ids[places[inside]]
        if not len(tokens):
            return []
        # Sorted suffixes that share a beginning have their next tokens in order.
        bounds = [0, *(np.flatnonzero(np.diff(tokens)) + 1).tolist(), len(tokens)]
        return [
            (
                int(tokens[start]),
                Match(match.length + 1, int(ranks[start]), int(ranks[stop - 1]) + 1),
            )
            for start, stop in pairwise(bounds)
        ]


def longest_end(
    text: Text, find: Callable[[Text], F | None], *, at_least: int, at_most: int
) -> F | None:
    """What `find` finds for the longest end of an encoded text for which it finds something.

    If it finds something for an end, it has to for all shorter ones.
    """
    low, high, best = at_least, min(at_most, len(text) // ID_BYTES), None
    while low <= high:
        length = (low + high + 1) // 2
        found = find(text[-length * ID_BYTES :])
        if found is None:
            high = length - 1
        else:
            best, low = found, length + 1
    return best


def encode(token_ids: Sequence[int]) -> bytes:
    """Ids as bytes that compare as the ids do."""
    return np.asarray(token_ids, dtype=">u4").tobytes()


def decode(text: bytes | bytearray, start: int = 0, stop: int | None = None) -> list[int]:
    """The ids that `encode` was given, or those from `start` to `stop`."""
    until = None if stop is None else stop * ID_BYTES
    ids: list[int] = np.frombuffer(text[start * ID_BYTES : until], dtype=">u4").tolist()
    return ids


def _sorted_suffixes(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Starts of the suffixes in the order of their first 64 tokens, the shorter of equals first."""
    if not len(ids):
        return np.empty(0, dtype=np.int32)
    _, rank = np.unique(ids, return_inverse=True)
    rank = rank.astype(np.int64) + 1
    order = np.argsort(rank, kind="stable")
    reach = 1
    while reach < SORTED_TOKENS and rank.max() < len(ids):
        behind = np.zeros_like(rank)  # 0: the suffix ends there, which comes before any token
        behind[:-reach] = rank[reach:]
        key = rank * (len(ids) + 1) + behind
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        rank[order] = np.cumsum(np.concatenate([[1], ordered[1:] != ordered[:-1]]))
        reach *= 2
    return order.astype(np.int32)
