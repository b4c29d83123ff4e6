"""Where the command line takes document and question from; one config per source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apb.errors import InputError
from apb.prompts.document import MAX_BYTES, MAX_PAGES, read_document

MakeNeedle = Callable[..., Mapping[str, str]]
"""``make_needle`` on a rank, where the tokenizer is: arguments in, the case's fields out."""


class PromptText(NamedTuple):
    """Document and question, and the right answer where it is known."""

    document: str
    question: str
    answer: str | None = None


@dataclass(kw_only=True, slots=True)
class PromptConfig(ABC):
    """Config of a prompt source."""

    @abstractmethod
    def load(self, make_needle: MakeNeedle, *, seed: int) -> PromptText:
        """The prompt.

        Raises:
            InputError: it cannot be read or is empty.
        """


@dataclass(kw_only=True, slots=True)
class NeedleConfig(PromptConfig):
    """A generated document of `context_len` tokens with a fact at `depth` (0 to 1, None random)."""

    context_len: int = 6144
    depth: float | None = None
    kind: str = "single"

    def load(self, make_needle: MakeNeedle, *, seed: int) -> PromptText:
        case = make_needle(
            context_len=self.context_len, depth=self.depth, kind=self.kind, seed=seed
        )
        return PromptText(case["document"], case["question"], case["answer"])


@dataclass(kw_only=True, slots=True)
class TextConfig(PromptConfig):
    """Document and question as given."""

    document: str = ""
    query: str = ""

    def load(self, make_needle: MakeNeedle, *, seed: int) -> PromptText:
        for name, value in (("document", self.document), ("query", self.query)):
            if not value.strip():
                raise InputError(f"prompt.{name} is empty: give the {name} as prompt.{name}=...")
        return PromptText(self.document, self.query)


@dataclass(kw_only=True, slots=True)
class FileConfig(TextConfig):
    """`document` is the path of a UTF-8 text or PDF file.

    Attributes:
        max_bytes: of a file, and of the text in it.
        max_pages: of a PDF.
    """

    max_bytes: int = MAX_BYTES
    max_pages: int = MAX_PAGES

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pages"):
            if getattr(self, name) < 1:
                raise InputError(f"prompt.{name}={getattr(self, name)} must be at least 1")

    def load(self, make_needle: MakeNeedle, *, seed: int) -> PromptText:
        given = TextConfig.load(self, make_needle, seed=seed)
        return given._replace(document=self.read(Path(given.document)))

    def read(self, path: Path) -> str:
        """The text of a file, which keeps the limits.

        Raises:
            InputError: it does not, or it cannot be read.
        """
        return read_document(path, max_bytes=self.max_bytes, max_pages=self.max_pages)
