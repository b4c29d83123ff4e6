"""Finding a checkpoint and refusing what apb cannot run, before any weight is read."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from apb.errors import InputError
from apb.hf.gguf import check_gguf_support
from apb.hf.manifest import Share, check_files, read_manifest
from apb.model_config import ModelConfig
from apb.paths import model_home

SUPPORTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as transformers wants it named: arguments for `from_pretrained`."""

    location: str
    options: dict[str, Any]
    gguf: Path | None = None

    @classmethod
    def find(cls, config: ModelConfig) -> Checkpoint:
        """Where the weights are.

        Raises:
            InputError: nothing there, or nothing in safetensors or GGUF.
        """
        # Literal False: None would make transformers ask on stdin, on every rank.
        options: dict[str, Any] = {"trust_remote_code": False}
        given = Path(config.path).expanduser()
        if given.suffix == ".gguf":
            if not given.is_file():
                raise InputError(f"model.path={config.path} is no file")
            check_gguf_support()
            return cls(str(given.parent), {**options, "gguf_file": given.name}, given)
        for folder in (given, model_home() / config.path):
            if config.path and folder.is_dir():
                _check_folder(folder)
                return cls(str(folder), options)
        if config.path.count("/") != 1 or given.is_absolute():
            raise InputError(
                f"model {config.name} is not on this machine (model.path={config.path!r}): "
                f"fetch it with `python -m apb.fetch {config.name}` or set model.path to a folder, "
                "a GGUF file or a Hub id"
            )
        if config.revision is not None:
            options["revision"] = config.revision
        return cls(config.path, options)

    def check_digests(self, config: ModelConfig, share: Share) -> None:
        """Raises InputError unless the files are those of `model.sha256`, where that is given."""
        if config.sha256 is None:
            return
        folder = Path(self.location)
        if not folder.is_dir():
            raise InputError(
                f"model.sha256 needs a folder or a GGUF file, and model.path={config.path} is a "
                "Hub id: download the model and give its folder"
            )
        weights = [self.gguf] if self.gguf else folder.glob("*.safetensors")
        check_files(
            folder,
            read_manifest(Path(config.sha256).expanduser()),
            [path.name for path in weights],
            share,
        )

    def load_config(self) -> PreTrainedConfig:
        """The Hugging Face configuration, refused by name if apb cannot run it."""
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.location, **self.options)
        except (OSError, ValueError, struct.error) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"cannot read a model from {self.location}: {reason}") from error
        check_supported(config)
        return config


def check_supported(config: PreTrainedConfig) -> None:
    """Raises InputError, naming the feature, for models that apb would run wrongly."""
    kind = config.model_type
    if kind not in SUPPORTED_TYPES:
        raise InputError(
            f"model type {kind!r} is not supported: apb runs RoPE models with full attention "
            f"({', '.join(SUPPORTED_TYPES)})"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise InputError(
            f"this {kind} model uses sliding-window attention (sliding_window={window}), which apb "
            "does not run: choose a checkpoint with full attention"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in _LENGTH_DEPENDENT_ROPE:
        raise InputError(
            f"this {kind} model uses {rope['rope_type']!r} RoPE, whose angles depend on the "
            "longest position a rank sees: ranks would disagree, so apb does not run it"
        )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no *.safetensors weights: apb loads safetensors or GGUF only, "
            "so convert the checkpoint first"
        )
