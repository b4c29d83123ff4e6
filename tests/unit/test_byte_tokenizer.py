"""Guarantees of the byte tokenizer: any text survives, ids are bytes, control tokens optional."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.hf.byte_tokenizer import CONTROL_TOKENS, byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXT = st.lists(st.text() | st.sampled_from([*CONTROL_TOKENS, "<0x41>", " ,", "n't"])).map("".join)


def plain_ids(text: str) -> list[int]:
    encoded = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


@settings(deadline=None)
@given(text=TEXT)
@example(text="<0x41>\x00\r\n \u00e9\u20ac\U0001f600 <|im_end|>")
def test_plain_ids_are_the_utf8_bytes_and_decode_back(text: str) -> None:
    ids = plain_ids(text)
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


@settings(deadline=None)
@given(text=TEXT)
def test_text_with_recognised_control_tokens_decodes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_control_tokens_follow_the_bytes() -> None:
    ids = TOKENIZER("".join(CONTROL_TOKENS), add_special_tokens=False)["input_ids"]
    assert ids == [256, 257, 258, 259]
    assert len(TOKENIZER) == 260


def test_bos_goes_before_text_where_special_tokens_are_asked_for() -> None:
    assert TOKENIZER("a")["input_ids"] == [TOKENIZER.bos_token_id, ord("a")]


def test_chat_template_writes_bos_turns_and_the_header_of_the_answer() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rendered = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    system, user = "<|im_start|>system\ns<|im_end|>\n", "<|im_start|>user\nu<|im_end|>\n"
    assert rendered == f"<|bos|>{system}{user}<|im_start|>assistant\n"
