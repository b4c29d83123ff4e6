"""Guarantees of streamed text: the pieces are the text, however it was cut into tokens, and no part
of a stop string gets out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.hf.byte_tokenizer import byte_tokenizer
from apb.prompts.answer import AnswerText
from apb.prompts.base import Tokenizer

BYTES = byte_tokenizer()
EOS = 257
REPLACEMENT = "\ufffd"
CHARACTERS = "ab\n \u00e9\u20ac\U0001f600"


class ChunkTokenizer:
    """Decodes token ``i`` to the i-th chunk of bytes, as a byte-level vocabulary would."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self._chunks = chunks

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return b"".join(self._chunks[i] for i in token_ids).decode(errors="replace")


class Streamed(NamedTuple):
    answer: AnswerText
    pieces: list[str]
    """One per token, then the rest."""


def stream(tokenizer: Any, token_ids: Sequence[int], **stops: Any) -> Streamed:
    answer = AnswerText(cast(Tokenizer, tokenizer), **stops)
    pieces = []
    for token_id in token_ids:
        pieces.append(answer.push(token_id))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    return Streamed(answer, pieces)


@st.composite
def chunked(draw: st.DrawFn, text: st.SearchStrategy[str]) -> list[bytes]:
    """A text as bytes, cut anywhere, also within characters."""
    data = draw(text).encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)))))
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def stream_chunks(chunks: Sequence[bytes], **stops: Any) -> Streamed:
    return stream(ChunkTokenizer(chunks), range(len(chunks)), **stops)


TEXT = st.text() | st.text(CHARACTERS)
STOPS = st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=3)


@settings(deadline=None)
@given(chunks=chunked(TEXT))
def test_pieces_are_the_text_for_any_tokens(chunks: list[bytes]) -> None:
    answer, pieces = stream_chunks(chunks)
    assert "".join(pieces) == answer.text == b"".join(chunks).decode()
    assert not answer.stopped


@settings(deadline=None)
@given(text=TEXT)
def test_pieces_are_the_text_for_the_byte_tokenizer(text: str) -> None:
    answer, pieces = stream(BYTES, list(text.encode()))
    assert "".join(pieces) == answer.text == text
    # A piece ends where a character does.
    for piece, byte in zip(pieces, text.encode(), strict=False):
        assert len(piece) <= 1 or byte >= 0x80


@settings(deadline=None)
@given(chunks=st.lists(st.binary(max_size=3), max_size=12))
def test_bytes_that_are_no_text_lose_nothing_that_is(chunks: list[bytes]) -> None:
    answer, pieces = stream_chunks(chunks)
    assert "".join(pieces) == answer.text
    whole = b"".join(chunks).decode(errors="replace")
    assert answer.text.replace(REPLACEMENT, "") == whole.replace(REPLACEMENT, "")


@settings(deadline=None)
@given(chunks=chunked(st.text(CHARACTERS, max_size=20)), stop=STOPS)
@example(chunks=[b"no E", b"N", b"D.\xe2", b"\x82\xac"], stop=["END"])
@example(chunks=[b"EN", b"EEND"], stop=["END"])
@example(chunks=[b"a", b"b", b"a", b"b"], stop=["bab", "aba"])
def test_text_ends_before_the_first_stop_string_and_no_piece_shows_it(
    chunks: list[bytes], stop: list[str]
) -> None:
    answer, pieces = stream_chunks(chunks, stop=stop)
    whole = b"".join(chunks).decode()
    assert "".join(pieces) == answer.text
    assert whole.startswith(answer.text)
    assert not any(word in answer.text for word in stop)
    assert answer.stopped == any(word in whole for word in stop)
    if answer.stopped:
        # What follows is a stop string.
        assert any(whole.startswith(word, len(answer.text)) for word in stop)
    else:
        assert answer.text == whole


@pytest.mark.parametrize("tail", [b"", b"\xe2", b"\xe2\x82"])
@pytest.mark.parametrize("ends_with_stop_id", [False, True])
def test_stop_string_before_an_unfinished_character_is_not_shown(
    tail: bytes, ends_with_stop_id: bool
) -> None:
    """The last token holds the stop string and the beginning of a character that never comes."""
    tokenizer = ChunkTokenizer([b"yes", b" END" + tail, b""])
    answer, pieces = stream(
        tokenizer, [0, 1, 2] if ends_with_stop_id else [0, 1], stop=["END"], stop_ids=[2]
    )
    assert "".join(pieces) == answer.text == "yes "
    assert answer.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_string_across_tokens_is_cut_at_its_first_letter(size: int) -> None:
    data = b"The answer.\nQuestion: more"
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    answer, pieces = stream_chunks(chunks, stop=["\nQuestion:"])
    assert "".join(pieces) == answer.text == "The answer."
    assert answer.stopped


def test_text_that_only_begins_like_a_stop_string_is_held_and_then_released() -> None:
    answer = AnswerText(BYTES, stop=["END"])
    assert [answer.push(ord(c)) for c in "aENx"] == ["a", "", "", "ENx"]
    assert [answer.push(ord(c)) for c in "EN"] == ["", ""]
    assert answer.finish() == "EN"
    assert answer.text == "aENxEN"


def test_stop_id_ends_the_text_and_is_no_part_of_it() -> None:
    answer, pieces = stream(BYTES, [*b"done", EOS, *b"more"], stop_ids=[EOS])
    assert "".join(pieces) == answer.text == "done"
    assert answer.stopped


def test_stop_id_as_the_first_token_gives_an_empty_answer() -> None:
    answer, pieces = stream(BYTES, [EOS], stop_ids=[EOS])
    assert ("".join(pieces), answer.text, answer.stopped) == ("", "", True)


def test_control_tokens_that_do_not_stop_are_not_shown() -> None:
    answer, pieces = stream(BYTES, [*b"a", EOS, *b"b"])
    assert "".join(pieces) == answer.text == "ab"


def test_unfinished_character_at_the_end_is_shown_as_a_replacement() -> None:
    answer, pieces = stream(BYTES, list("x\u20ac".encode())[:-1])
    assert pieces[0] == "x"
    assert answer.text.startswith("x" + REPLACEMENT)
    assert set(answer.text[1:]) == {REPLACEMENT}


def test_finish_may_be_called_again() -> None:
    answer = AnswerText(BYTES, stop=["ab"])
    answer.push(ord("a"))
    assert (answer.finish(), answer.finish(), answer.text) == ("a", "", "a")
