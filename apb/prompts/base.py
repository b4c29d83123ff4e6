"""The parts of a prompt as token ids, and what a tokenizer must offer to make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """One prompt, split by structure; the model reads prefix, document and query in this order."""

    prefix_ids: tuple[int, ...]
    """Template tokens before the document: BOS, system turn, user header; may be empty."""
    document_ids: tuple[int, ...]
    """The long document, at least one token; from text, none of them a control token."""
    query_ids: tuple[int, ...]
    """The question and the template tokens around it, up to where the answer starts."""

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Prefix and document: what the ranks share out."""
        return self.prefix_ids + self.document_ids


class AddedToken(Protocol):
    """One entry of a tokenizer's list of added tokens."""

    @property
    def content(self) -> str: ...
    @property
    def special(self) -> bool: ...


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that prompts are built with."""

    @property
    def chat_template(self) -> Any:
        """Jinja source, a mapping of names to sources, or `None`."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Id to token, for the tokens that are found in a text before it is split into words."""

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""

    def __call__(
        self, text: str, /, *, add_special_tokens: bool, split_special_tokens: bool, verbose: bool
    ) -> Mapping[str, Any]:
        """Return a mapping whose `input_ids` are the ids of `text`."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Renders turns, as text with ``tokenize=False``; the template has keywords of its own."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> Any:
        """Return the text of `token_ids`."""
