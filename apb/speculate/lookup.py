"""Drafts by prompt lookup: what followed the last place that ended like the text does now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.suffix_index import ID_BYTES, Text, decode, encode, longest_end
from apb.speculate.tree import Claim, TreeBuilder


class Recurrence(NamedTuple):
    """An earlier place in a text whose last `length` tokens are those of its end."""

    length: int
    stop: int
    """Tokens up to the end of that place."""


def latest_recurrence(text: Text, *, at_least: int, at_most: int) -> Recurrence | None:
    """The longest end of an encoded text that also stands earlier, at the latest such place."""

    def find(end: Text) -> Recurrence | None:
        """Not the place at the very end; hits across token borders do not count."""
        stop = len(text) - 1
        while (found := text.rfind(end, 0, stop)) >= 0:
            if found % ID_BYTES == 0:
                return Recurrence(len(end) // ID_BYTES, (found + len(end)) // ID_BYTES)
            stop = found + len(end) - 1
        return None

    return longest_end(text, find, at_least=at_least, at_most=at_most)


_BY_CHANCE = 0.7
"""How often a match of one token does not go on alike."""
_OF_PROMPT = 16
"""Kinds of claims from here on are of matches in the prompt."""


def claims_of_copy(match_len: int) -> Iterator[Claim]:
    """Of the tokens behind a place in the text that matches its end: each accepted one makes the
    match longer, and so the next one likelier.
    """
    for length in count(match_len):
        yield Claim(1.0 - _BY_CHANCE**length, length.bit_length())


def claim_of_match(match_len: int, share: float) -> Claim:
    """Of a token that goes on so after some share of the matches in the prompt."""
    return Claim(share * (1.0 - _BY_CHANCE**match_len), _OF_PROMPT + match_len.bit_length())


class LookupDrafter(Drafter):
    """Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding):
    one chain, copied from behind the latest recurrence of the last few tokens.
    """

    def __init__(self, *, min_match: int, max_match: int, length: int) -> None:
        self._min_match, self._max_match, self._length = min_match, max_match, length
        self._text = bytearray()  # a million tokens are not to be copied for each new one

    def begin(self, request: DraftRequest) -> None:
        self._text = bytearray(encode(request.prompt_ids))

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._text += encode(new_ids)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        found = latest_recurrence(self._text, at_least=self._min_match, at_most=self._max_match)
        if found is not None:
            copied = decode(self._text, found.stop, found.stop + self._length)
            tree.add_path(copied, source=source, claims=claims_of_copy(found.length))


@dataclass(kw_only=True, slots=True)
class LookupConfig(DrafterConfig):
    """Config of `LookupDrafter`.

    Attributes:
        min_match: shortest recurrence that is continued.
        max_match: longest that is looked for.
        length: tokens drafted.
    """

    min_match: int = 1
    max_match: int = 3
    length: int = 10

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        if not 1 <= self.min_match <= self.max_match:
            raise InputError(
                f"drafter.min_match={self.min_match} must lie between 1 and "
                f"drafter.max_match={self.max_match}"
            )
        if self.length < 1:
            raise InputError(f"drafter.length={self.length} must be at least 1")

    def build_drafter(self, target: DraftTarget) -> LookupDrafter:
        return LookupDrafter(min_match=self.min_match, max_match=self.max_match, length=self.length)
