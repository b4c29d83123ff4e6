"""A document and a question to `PromptTokens`: the template is taken apart, never guessed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from apb.errors import InputError
from apb.prompts.base import PromptTokens, Tokenizer
from apb.prompts.encode import (
    checked_ids,
    control_tokens,
    encode_markup,
    encode_plain,
    split_start,
    start_ids,
)

USER_TEMPLATE = "{document}\n\n{question}"

# Letters only, in both cases: trimming and escaping leave them alone, any other change shows.
_DOCUMENT_MARK = "qZxApbDocumentMarkWvJ"
_QUESTION_MARK = "qZxApbQuestionMarkWvJ"


class _Frame(NamedTuple):
    """The text around document and question."""

    before: str
    between: str
    after: str


def build_prompt(
    tokenizer: Tokenizer,
    document: str | Sequence[int],
    question: str | Sequence[int],
    *,
    template: str = "auto",
    user_template: str = USER_TEMPLATE,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    answer_start: str = "",
) -> PromptTokens:
    """Return the prompt that asks `question` about `document`.

    Text is kept to the letter, also where the template would trim it, and control tokens in it are
    text; token ids are used as they are. `template` is `chat` (the tokenizer's own), `plain` (what
    the tokenizer starts every text with, `user_template`, a newline), `raw` (document and question
    and nothing else) or `auto` (`chat` if there is one). `user_template` says how both stand in the
    user's turn and may itself use control tokens. `chat_template_kwargs` are variables of the
    tokenizer's own template. The answer goes on from `answer_start`.

    Raises:
        InputError: either part is empty or not encodable, or a template is unusable.
    """
    use_chat = _use_chat(tokenizer, template)
    frame = _user_frame("{document}{question}" if template == "raw" else user_template)
    if use_chat:
        frame = _chat_frame(tokenizer, frame, chat_template_kwargs)
        prefix = encode_markup(tokenizer, frame.before, at_start=True)
    elif template != "raw":
        prefix = start_ids(tokenizer) + encode_markup(tokenizer, frame.before)
        frame = frame._replace(after=frame.after + "\n")
    template_text = "".join(frame) + (str(tokenizer.chat_template) if use_chat else "")
    controls = control_tokens(tokenizer, template_text)
    document_ids = _part_ids(tokenizer, document, controls=controls, name="document")
    if template == "raw":
        prefix, document_ids = split_start(tokenizer, document_ids)
    question_ids = _part_ids(tokenizer, question, controls=controls, name="question")
    between = encode_markup(tokenizer, frame.between)
    after = encode_markup(tokenizer, frame.after)
    if answer_start:
        after += encode_plain(tokenizer, answer_start, controls=controls, name="answer_start")
    return PromptTokens(tuple(prefix), tuple(document_ids), (*between, *question_ids, *after))


def _use_chat(tokenizer: Tokenizer, template: str) -> bool:
    if template not in ("auto", "chat", "plain", "raw"):
        raise InputError(
            f"template={template!r} is none of auto, chat, plain, raw; change model.template"
        )
    if template == "chat" and not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template for template='chat'; set model.template to plain"
        )
    return template not in ("plain", "raw") and bool(tokenizer.chat_template)


def _user_frame(user_template: str) -> _Frame:
    before, _, rest = user_template.partition("{document}")
    between, _, after = rest.partition("{question}")
    counts = user_template.count("{document}"), user_template.count("{question}")
    if counts != (1, 1) or "{question}" in before:
        raise InputError(
            f"user_template={user_template!r} must hold {{document}} and, after it, {{question}}, "
            "each once; change model.user_template"
        )
    return _Frame(before, between, after)


def _chat_frame(tokenizer: Tokenizer, user: _Frame, kwargs: Mapping[str, Any]) -> _Frame:
    content = user.before + _DOCUMENT_MARK + user.between + _QUESTION_MARK + user.after
    turns = [{"role": "user", "content": content}]
    try:
        rendered = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **kwargs
        )
    except Exception as error:  # a template is the model author's program and may raise anything
        raise InputError(
            f"the chat template cannot write a user turn ({error}); set model.template to plain"
        ) from error
    before, _, rest = rendered.partition(_DOCUMENT_MARK)
    between, _, after = rest.partition(_QUESTION_MARK)
    counts = rendered.count(_DOCUMENT_MARK), rendered.count(_QUESTION_MARK)
    if counts != (1, 1) or _QUESTION_MARK in before:
        raise InputError(
            "the chat template changes, drops or repeats what the user says "
            f"(document {counts[0]} times, question {counts[1]} times, once each expected); "
            "set model.template to plain"
        )
    return _Frame(before, between, after)


def _part_ids(
    tokenizer: Tokenizer, part: str | Sequence[int], *, controls: dict[int, str], name: str
) -> list[int]:
    if isinstance(part, str):
        ids = encode_plain(tokenizer, part, controls=controls, name=name) if part.strip() else []
    else:
        ids = checked_ids(part, vocab_size=len(tokenizer), name=name)
    if not ids:
        raise InputError(f"the {name} is empty; give a {name} of at least one word or one token id")
    return ids
