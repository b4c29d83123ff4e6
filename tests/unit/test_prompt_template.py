"""Guarantees of `build_prompt`: parts split by structure, control tokens only from the template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from apb.errors import InputError
from apb.hf.byte_tokenizer import CONTROL_TOKENS, byte_tokenizer
from apb.prompts.base import PromptTokens, Tokenizer
from apb.prompts.template import build_prompt

TOKENIZER = byte_tokenizer()
FIRST_CONTROL_ID = 256
HEADER, FOOTER = "<|bos|><|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TEXT = (
    st.lists(st.text() | st.sampled_from(CONTROL_TOKENS), min_size=1)
    .map("".join)
    .filter(lambda text: bool(text.strip()))
)


def decoded(*parts: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode([token_id for part in parts for token_id in part]))


def utf8(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def with_template(chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


def error_of(
    document: str | Sequence[int] = "d",
    question: str | Sequence[int] = "q",
    tokenizer: Tokenizer = TOKENIZER,
    **settings: Any,
) -> str:
    with pytest.raises(InputError) as caught:
        build_prompt(tokenizer, document, question, **settings)
    return str(caught.value)


@settings(deadline=None)
@given(document=TEXT, question=TEXT)
def test_parts_decode_to_the_rendered_chat(document: str, question: str) -> None:
    prompt = build_prompt(TOKENIZER, document, question)
    turns = [{"role": "user", "content": f"{document}\n\n{question}"}]
    rendered = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert decoded(prompt.prefix_ids, prompt.document_ids, prompt.query_ids) == rendered
    assert decoded(prompt.prefix_ids) == HEADER
    assert decoded(prompt.query_ids) == f"\n\n{question}{FOOTER}"


@settings(deadline=None)
@given(document=TEXT, question=TEXT, template=st.sampled_from(["chat", "plain"]))
def test_control_tokens_in_outside_text_are_text(
    document: str, question: str, template: str
) -> None:
    prompt = build_prompt(TOKENIZER, document, question, template=template)
    assert prompt.document_ids == utf8(document)
    around = prompt.prefix_ids + prompt.query_ids
    controls = [token_id for token_id in around if token_id >= FIRST_CONTROL_ID]
    assert controls == ([256, 258, 259, 258] if template == "chat" else [256])


def test_context_is_prefix_then_document() -> None:
    assert PromptTokens((1, 2), (3,), (4,)).context_ids == (1, 2, 3)


def test_markup_of_the_user_template_is_recognised_and_braces_are_kept() -> None:
    user_template = '{"json"}<|eos|>{document}|{question}!'
    prompt = build_prompt(TOKENIZER, "d", "q", user_template=user_template)
    assert decoded(prompt.prefix_ids) == HEADER + '{"json"}<|eos|>'
    assert TOKENIZER.eos_token_id in prompt.prefix_ids
    assert decoded(prompt.query_ids) == "|q!" + FOOTER


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ messages[0].content }}   {{ '<' + 'think>' }}",
        "{{ messages[0].content }}   {% if tools %}<think>{% endif %}",
    ],
)
def test_unmarked_control_tokens_of_the_template_are_text_in_a_document(chat_template: str) -> None:
    tokenizer = with_template(chat_template)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "   ")])
    spaces_id = tokenizer.convert_tokens_to_ids("   ")
    prompt = build_prompt(tokenizer, "a<think><think>b   c", "<think>")
    assert prompt.document_ids == (*utf8("a<think><think>b"), spaces_id, ord("c"))
    assert prompt.query_ids[:10] == (*utf8("\n\n<think>"), spaces_id)


def test_unmarked_tokens_that_the_template_does_not_use_are_left_to_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("whereas", normalized=False)])
    assert build_prompt(tokenizer, "whereas", "q").document_ids == (260,)


@pytest.mark.parametrize("special", [True, False])
def test_control_token_of_one_character_is_text_or_refused(special: bool) -> None:
    tokenizer = with_template("{{ messages[0].content }}@")
    tokenizer.add_tokens([AddedToken("@", special=special, normalized=False)], special)
    if special:
        assert build_prompt(tokenizer, "a@b", "q").document_ids == utf8("a@b")
    else:
        assert error_of("a@b", tokenizer=tokenizer).startswith("the document holds '@', a control")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_tokenizer_that_cannot_split_special_tokens_is_no_way_out(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()

    def ignore_split(self: PreTrainedTokenizerFast, text: str, **settings: bool) -> Any:
        return encode(self, text, **{**settings, "split_special_tokens": False})

    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", ignore_split)
    prompt = build_prompt(tokenizer, "<|eos|><|im_end|>", "q", template=template)
    assert prompt.document_ids == utf8("<|eos|><|im_end|>")


def test_space_that_a_tokenizer_adds_at_the_start_is_added_once() -> None:
    tokenizer = with_template("User:{{ messages[0].content }}")
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    prompt = build_prompt(tokenizer, "d", "q")
    assert prompt == PromptTokens(utf8("\u2581User:"), utf8("d"), utf8("\n\nq"))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_tokenizer_keeps_recognising_control_tokens_afterwards(template: str) -> None:
    tokenizer = byte_tokenizer()
    first = build_prompt(tokenizer, "<|eos|>", "<|eos|>", template=template)
    assert tokenizer.backend_tokenizer.encode("<|eos|>", add_special_tokens=False).ids == [257]
    assert build_prompt(tokenizer, "<|eos|>", "<|eos|>", template=template) == first


def test_left_over_tokenizer_state_does_not_matter() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = True
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert build_prompt(tokenizer, "d", "q") == build_prompt(TOKENIZER, "d", "q")


def test_plain_is_bos_document_question() -> None:
    prompt = build_prompt(TOKENIZER, "d", "q", template="plain")
    assert prompt == PromptTokens((256,), utf8("d"), utf8("\n\nq\n"))


def test_plain_has_no_bos_where_the_tokenizer_adds_none() -> None:
    tokenizer = with_template(None)
    tokenizer.backend_tokenizer.post_processor = None
    assert build_prompt(tokenizer, "d", "q").prefix_ids == ()


def test_raw_is_document_and_question_alone() -> None:
    prompt = build_prompt(TOKENIZER, "d<|eos|>", "q", template="raw")
    assert prompt == PromptTokens((), utf8("d<|eos|>"), utf8("q"))


@pytest.mark.parametrize("ids", [[256, 1, 2], [256, 256, 1], [256], [1, 256], [1]], ids=str)
def test_raw_takes_what_texts_start_with_for_the_prefix_and_leaves_a_document(
    ids: list[int],
) -> None:
    prompt = build_prompt(TOKENIZER, ids, "q", template="raw")
    assert prompt.context_ids == tuple(ids)
    assert prompt.prefix_ids == ((256,) if ids[0] == 256 and len(ids) > 1 else ())
    bare = with_template(None)
    bare.backend_tokenizer.post_processor = None  # starts no text with anything
    assert build_prompt(bare, ids, "q", template="raw").prefix_ids == ()


@pytest.mark.parametrize("template", ["chat", "plain", "raw"])
def test_the_start_of_an_answer_follows_all_else_and_is_text(template: str) -> None:
    begun = build_prompt(TOKENIZER, "d", "q", template=template, answer_start="It is<|eos|>")
    alone = build_prompt(TOKENIZER, "d", "q", template=template)
    assert begun.context_ids == alone.context_ids
    assert begun.query_ids == alone.query_ids + utf8("It is<|eos|>")


def test_auto_is_chat_only_with_a_chat_template() -> None:
    auto, chat = (
        build_prompt(TOKENIZER, "d", "q"),
        build_prompt(TOKENIZER, "d", "q", template="chat"),
    )
    plain = build_prompt(TOKENIZER, "d", "q", template="plain")
    assert auto == chat != plain
    assert build_prompt(with_template(None), "d", "q") == plain


def test_bos_is_written_once() -> None:
    prompt = build_prompt(TOKENIZER, "d", "q")
    assert (prompt.context_ids + prompt.query_ids).count(256) == 1
    silent = with_template("{{ messages[0].content }}")
    assert 256 not in build_prompt(silent, "d", "q").context_ids


def test_template_that_trims_leaves_the_document_whole() -> None:
    tokenizer = with_template("{{ messages[0].content | trim }}")
    prompt = build_prompt(tokenizer, "  d\n", " q ")
    assert decoded(prompt.document_ids, prompt.query_ids) == "  d\n\n\n q "


def test_token_ids_are_used_as_they_are() -> None:
    prompt = build_prompt(TOKENIZER, [1, 257, 2], (3, 4))
    assert prompt.document_ids == (1, 257, 2)
    assert prompt.query_ids[:4] == (*utf8("\n\n"), 3, 4)


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content[:30] }}",
        "nothing",
        "{{ messages[0].content.split('\n')[-1] }}{{ messages[0].content.split('\n')[0] }}",
    ],
)
def test_template_that_alters_the_content_is_refused(chat_template: str) -> None:
    message = error_of(tokenizer=with_template(chat_template))
    assert message.startswith("the chat template changes, drops or repeats what the user says")
    assert message.endswith("set model.template to plain")


def test_template_that_fails_is_refused() -> None:
    message = error_of(tokenizer=with_template("{{ raise_exception('no user here') }}"))
    assert message.startswith("the chat template cannot write a user turn (no user here)")


@pytest.mark.parametrize("empty", ["", " \n\t", []])
def test_empty_parts_are_refused(empty: str | list[int]) -> None:
    assert error_of(document=empty).startswith("the document is empty; give a document of")
    assert error_of(question=empty).startswith("the question is empty; give a question of")


@pytest.mark.parametrize("token_id", [-1, 260])
def test_token_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    message = error_of(document=[0, 259, token_id])
    assert f"token id {token_id} at position 2 of the document is outside 0 to 259" in message


@pytest.mark.parametrize("part", [[1.5], [[1]], ["a"], 7])
def test_what_is_no_list_of_token_ids_is_refused(part: list[int]) -> None:
    assert "the question is neither text nor a flat list of token ids" in error_of(question=part)


def test_bytes_are_refused() -> None:
    assert error_of(document=b"text").startswith("the document is bytes, neither text nor token")


def test_lone_surrogates_are_refused_by_position() -> None:
    assert "lone surrogate U+D800 at character 2" in error_of(document="ab\ud800")


@pytest.mark.parametrize(
    "user_template",
    ["{document}", "{question}", "{question}{document}", "{document}{document}{question}", ""],
)
def test_user_template_without_both_fields_in_order_is_refused(user_template: str) -> None:
    message = error_of(user_template=user_template)
    assert message.startswith(f"user_template={user_template!r} must hold {{document}} and, after")


def test_variables_of_the_chat_template_reach_it_and_the_text_around_the_question() -> None:
    tokenizer = with_template("{{ messages[0].content }}{% if not thinking %}<|im_end|>{% endif %}")
    silent = build_prompt(tokenizer, "d", "q", chat_template_kwargs={"thinking": False})
    loud = build_prompt(tokenizer, "d", "q", chat_template_kwargs={"thinking": True})
    assert decoded(silent.query_ids) == decoded(loud.query_ids) + "<|im_end|>"


def test_unknown_and_missing_templates_are_refused() -> None:
    assert error_of(template="chatml").startswith("template='chatml' is none of auto, chat, plain")
    message = error_of(tokenizer=with_template(None), template="chat")
    assert message.startswith("the tokenizer has no chat template for template='chat'")
