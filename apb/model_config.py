"""Which model to run, as the configuration names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """One YAML per model in `conf/model/`.

    Attributes:
        name: what results call it.
        path: a folder, a GGUF file, a folder below the model home, or a Hub id.
        revision: Hub revision.
        template: `auto`, `chat` or `plain` (see `apb.prompts.template`).
        user_template: how document and question share the user's turn.
        architecture: random weights for this Hugging Face configuration instead of a checkpoint.
        weights_seed: seed of those random weights.
    """

    name: str = "custom"
    path: str = ""
    revision: str | None = None
    template: str = "auto"
    user_template: str = "{document}\n\n{question}"
    architecture: dict[str, Any] | None = None
    weights_seed: int = 0
