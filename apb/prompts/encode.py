"""Text to token ids, at two levels of trust: markup may write control tokens, plain text cannot."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

from apb.errors import InputError
from apb.prompts.base import Tokenizer


def control_tokens(tokenizer: Tokenizer, template_text: str) -> dict[int, str]:
    """Return id and text of the tokens that plain text must not produce.

    These are the special tokens, and the added tokens that `template_text` uses although they are
    not marked special (many chat models leave `<think>` or `<tool_call>` unmarked). Runs of spaces
    that were added to shorten code are text wherever they stand.
    """
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template_text and not token.content.isspace())
    }


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer itself puts before any text: BOS for most, nothing for some."""
    probe = "a"
    bare = _encode(tokenizer, probe, plain=False)
    whole = _encode(tokenizer, probe, plain=False, add_special_tokens=True)
    starts = range(len(whole) - len(bare) + 1)
    return next((whole[:at] for at in starts if whole[at : at + len(bare)] == bare), [])


def split_start(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[int], list[int]]:
    """Return the `start_ids` that a text without a template begins with, and the rest.

    APB's anchor shows the query behind them, so that the attention sink stays at position 0. The
    rest is never empty: what is nothing but a start is all of the text.
    """
    start = start_ids(tokenizer)
    begins = len(ids) > len(start) and ids[: len(start)] == start
    return (start, ids[len(start) :]) if begins else ([], ids)


def encode_markup(tokenizer: Tokenizer, text: str, *, at_start: bool = False) -> list[int]:
    """Encode text that we or the model's author wrote; control tokens in it keep their meaning."""
    encode = _encode if at_start else _encode_inside
    return encode(tokenizer, text, plain=False)


def encode_plain(
    tokenizer: Tokenizer, text: str, *, controls: Mapping[int, str], name: str
) -> list[int]:
    """Encode text from outside, named `name` in errors; the result holds none of `controls`."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {name} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no tokenizer accepts; remove it or decode the {name} as UTF-8"
        ) from error
    ids = _encode_inside(tokenizer, text, plain=True)
    if controls.keys().isdisjoint(ids):
        return ids
    # Asked for plain text, tokenizers still match added tokens that are not marked special.
    pieces = _cut_inside(text, controls.values())
    ids = list(
        chain.from_iterable(_encode_inside(tokenizer, piece, plain=True) for piece in pieces)
    )
    for token_id in ids:
        if token_id in controls:
            raise InputError(
                f"the {name} holds {controls[token_id]!r}, a control token that this tokenizer "
                f"cannot encode as text; remove it from the {name}"
            )
    return ids


def checked_ids(part: Sequence[int], *, vocab_size: int, name: str) -> list[int]:
    """Return `part` as integers of the vocabulary; `name` is what errors call it."""
    if isinstance(part, bytes | bytearray):
        raise InputError(f"the {name} is bytes, neither text nor token ids; decode it to str first")
    try:
        ids = [operator.index(item) for item in part]
    except TypeError as error:
        raise InputError(
            f"the {name} is neither text nor a flat list of token ids ({error}); pass one of them"
        ) from error
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InputError(
                f"token id {token_id} at position {position} of the {name} is outside 0 to "
                f"{vocab_size - 1}, the vocabulary; encode the {name} with this model's tokenizer"
            )
    return ids


def _cut_inside(text: str, tokens: Iterable[str]) -> list[str]:
    """Cut each token in `text` after its first character, so that no piece holds a whole one."""
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]


def _encode_inside(tokenizer: Tokenizer, text: str, *, plain: bool) -> list[int]:
    """Encode text that follows other text."""
    if not text:
        return []
    # SentencePiece puts a space before what it takes for the start; a newline stands there instead.
    newline_ids = _encode(tokenizer, "\n", plain=plain)
    ids = _encode(tokenizer, "\n" + text, plain=plain)
    if ids[: len(newline_ids)] == newline_ids:
        return ids[len(newline_ids) :]
    return _encode(tokenizer, text, plain=plain)


def _encode(
    tokenizer: Tokenizer, text: str, *, plain: bool, add_special_tokens: bool = False
) -> list[int]:
    # The flag is written into the shared Rust tokenizer and stays there, so every call names it.
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, split_special_tokens=plain, verbose=False
    )
    return list(encoded["input_ids"])
