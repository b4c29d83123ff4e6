"""Drafts by prompt lookup: what followed the last place that ended like the text does now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apb.errors import InputError
from apb.speculate.base import Drafter, DrafterConfig, Verified
from apb.speculate.suffix_index import ID_BYTES, decode, encode
from apb.speculate.tree import TreeBuilder


class Recurrence(NamedTuple):
    """An earlier place in a text whose last `length` tokens are those of its end."""

    length: int
    stop: int
    """Tokens up to the end of that place."""


def latest_recurrence(text: bytes | bytearray, *, at_least: int, at_most: int) -> Recurrence | None:
    """The longest end of an encoded text that also stands earlier, at the latest such place."""
    num_tokens = len(text) // ID_BYTES
    low, high, best = at_least, min(at_most, num_tokens - 1), None
    # If an end of some length recurs, so do all shorter ones.
    while low <= high:
        length = (low + high + 1) // 2
        place = _last_place(text, text[-length * ID_BYTES :])
        if place is None:
            high = length - 1
        else:
            best, low = Recurrence(length, place + length), length + 1
    return best


def _last_place(text: bytes | bytearray, pattern: bytes | bytearray) -> int | None:
    """In tokens, and not the one at the very end. Hits across token borders do not count."""
    stop = len(text) - 1
    while (found := text.rfind(pattern, 0, stop)) >= 0:
        if found % ID_BYTES == 0:
            return found // ID_BYTES
        stop = found + len(pattern) - 1
    return None


class LookupDrafter(Drafter):
    """Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding):
    one chain, copied from behind the latest recurrence of the last few tokens.
    """

    def __init__(self, *, min_match: int, max_match: int, length: int) -> None:
        self._min_match, self._max_match, self._length = min_match, max_match, length
        self._text = bytearray()  # a million tokens are not to be copied for each new one

    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._text = bytearray(encode(prompt_ids))

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        self._text += encode(new_ids)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        found = latest_recurrence(self._text, at_least=self._min_match, at_most=self._max_match)
        if found is not None:
            stop = found.stop + self._length
            copied = decode(self._text[found.stop * ID_BYTES : stop * ID_BYTES])
            tree.add_path(copied, source=source)


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

    def build_drafter(self) -> LookupDrafter:
        return LookupDrafter(min_match=self.min_match, max_match=self.max_match, length=self.length)
