"""Which model to run and how, as the configuration names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apb.errors import InputError
from apb.paths import shipped_weights

CHUNK_LEN = 2048
"""Rows that row-wise modules work on at once: enough to fill a GPU, little beside a document."""


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    """How a model is run, whatever the method.

    Attributes:
        chunk_len: rows that MLPs and norms work on at once; it bounds their memory.
    """

    chunk_len: int = CHUNK_LEN

    def __post_init__(self) -> None:
        if self.chunk_len < 1:
            raise InputError(f"runtime.chunk_len={self.chunk_len} must be at least 1")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """One YAML per model in `conf/model/`.

    Attributes:
        name: what results call it.
        path: a folder, a GGUF file, a folder below the model home, or a Hub id.
        revision: Hub revision.
        sha256: a file with digests, as `sha256sum` writes it, that the model's files must have.
        template: `auto`, `chat`, `plain` or `raw` (see `apb.prompts.template`).
        user_template: how document and question share the user's turn.
        chat_template_kwargs: variables of the tokenizer's chat template, such as `enable_thinking`.
        architecture: random weights for this Hugging Face configuration instead of a checkpoint.
        weights_seed: seed of those random weights.
        drafting: a folder with an EAGLE head and its frequency list; a name is one that apb ships.
        shape: the fields of `apb.cost.ModelShape`, for plans made without the checkpoint.
    """

    name: str = "custom"
    path: str = ""
    revision: str | None = None
    sha256: str | None = None
    template: str = "auto"
    user_template: str = "{document}\n\n{question}"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None
    weights_seed: int = 0
    drafting: str | None = None
    shape: dict[str, int] | None = None

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """What `apb.prompts.template.build_prompt` is to be told of the model."""
        return {
            "template": self.template,
            "user_template": self.user_template,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    @property
    def shipped_folder(self) -> Path | None:
        """The weights that apb ships for the model of this name, where there are any."""
        folder = shipped_weights() / self.name
        return folder if folder.is_dir() else None

    @property
    def drafting_folder(self) -> Path | None:
        """Where that is.

        Raises:
            InputError: there is no such folder.
        """
        if self.drafting is None:
            return None
        for folder in (Path(self.drafting).expanduser(), shipped_weights() / self.drafting):
            if folder.is_dir():
                return folder
        raise InputError(
            f"model.drafting={self.drafting} is neither a folder nor a name that apb ships"
        )
