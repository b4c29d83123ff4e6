"""Guarantees of searching a document: the longest match and its continuations, by brute force."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.speculate.lookup import Recurrence, latest_recurrence
from apb.speculate.suffix_index import MAX_MATCH, Match, SuffixIndex, decode, encode

# Few different tokens, so that much recurs; one that fills all of its bytes.
TOKENS = st.sampled_from([0, 1, 2, 255, 256, 2**31])
TEXTS = st.lists(TOKENS, max_size=60)


def places(text: list[int], pattern: list[int]) -> list[int]:
    size = len(pattern)
    return [i for i in range(len(text) - size + 1) if text[i : i + size] == pattern]


def longest(text: list[int], recent: list[int], at_least: int) -> int | None:
    lengths = range(min(len(recent), MAX_MATCH), at_least - 1, -1)
    return next((n for n in lengths if places(text, recent[len(recent) - n :])), None)


@given(text=TEXTS, recent=TEXTS, at_least=st.integers(1, 4))
def test_longest_match_and_its_continuations(
    text: list[int], recent: list[int], at_least: int
) -> None:
    index = SuffixIndex(text)
    found = index.longest_match(recent, at_least=at_least)
    expected = longest(text, recent, at_least)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.length == expected
    pattern = recent[len(recent) - expected :]
    assert found.last - found.first == len(places(text, pattern))
    assert_continuations(index, text, pattern, found, depth=3)


def assert_continuations(
    index: SuffixIndex, text: list[int], pattern: list[int], match: Match, depth: int
) -> None:
    followers = Counter(
        text[i + len(pattern)] for i in places(text, pattern) if i + len(pattern) < len(text)
    )
    found = index.continuations(match)
    assert {token: child.last - child.first for token, child in found} == followers
    for token, child in found if depth else []:
        assert_continuations(index, text, [*pattern, token], child, depth - 1)


def test_many_places_are_sampled_evenly() -> None:
    text = [7, *([1, 2] * 900), *([1, 3] * 100)]
    index = SuffixIndex(text)
    match = index.longest_match([7, 9, 1], at_least=1)
    assert match is not None
    assert match.last - match.first == 1000
    sampled = {
        token: child.last - child.first for token, child in index.continuations(match, at_most=50)
    }
    assert sampled[2] / sum(sampled.values()) == pytest.approx(0.9, abs=0.05)


@given(text=TEXTS, at_least=st.integers(1, 3), at_most=st.integers(3, 9))
def test_latest_recurrence(text: list[int], at_least: int, at_most: int) -> None:
    expected = None
    for length in range(min(at_most, len(text) - 1), at_least - 1, -1):
        earlier = places(text, text[-length:])[:-1]
        if earlier:
            expected = Recurrence(length, earlier[-1] + length)
            break
    assert latest_recurrence(encode(text), at_least=at_least, at_most=at_most) == expected


@given(ids=st.lists(st.integers(0, 2**32 - 1)))
def test_encoded_ids_compare_as_ids_and_come_back(ids: list[int]) -> None:
    assert decode(encode(ids)) == ids
    assert sorted(ids) == sorted(ids, key=lambda token_id: encode([token_id]))
