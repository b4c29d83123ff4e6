"""Reading the files of an EAGLE head, whoever wrote them, under one set of tensor names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apb.errors import InputError

_PREFIXES = {"midlayer.": "layers.0.", "transformer.": "layers.0.", "fusion_fc.": "fc."}
_NAMES = {"draft_id_to_target_id": "d2t", "target_id_to_draft_id": "t2d"}
_BUFFERS = "rotary_emb.inv_freq"
_MAPS = ("d2t", "t2d", "hot_token_id")


@dataclass(frozen=True, slots=True, eq=False)
class HeadFiles:
    """A folder's ``config.json`` and weights.

    Names of tensors are those of the EAGLE repository, `midlayer` being `layers.0`. What others
    add is undone: ``model.`` before all names (SGLang, NeMo), ``fusion_fc`` and ``transformer``
    (speculators, EAGLE-1), ``draft_id_to_target_id`` (vLLM).
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    has_midlayer: bool = False
    """As EAGLE and SpecForge name it."""

    @classmethod
    def read(cls, folder: str | Path) -> HeadFiles:
        """Raises InputError where a file is missing or damaged."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"drafter.head={folder} is no folder: give one with the config.json and the "
                "weights of an EAGLE head"
            )
        tensors: dict[str, Tensor] = {}
        has_midlayer = False
        for given, tensor in _tensors(folder):
            name = canonical_name(given)
            if name.endswith(_BUFFERS):
                continue
            if name in tensors:
                raise InputError(f"{folder} holds tensor {name} twice, once as {given}")
            has_midlayer |= given.removeprefix("model.").startswith("midlayer.")
            tensors[name] = tensor
        files = cls(folder, _config(folder), tensors, has_midlayer)
        files._refuse_other_drafters()
        files._refuse_numbers_other_than_floats()
        return files

    @property
    def layer_config(self) -> Mapping[str, Any]:
        """The decoder layer's settings, which speculators nests."""
        nested: Mapping[str, Any] = self.config.get("transformer_layer_config") or self.config
        return nested

    @property
    def is_from_specforge(self) -> bool:
        """SpecForge writes EAGLE's names under SGLang's architecture."""
        architectures = self.config.get("architectures") or ()
        return self.has_midlayer and "LlamaForCausalLMEagle3" in architectures

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a matrix that every head has."""
        if name not in self.tensors:
            raise InputError(f"{self.folder} is no EAGLE head: it has no tensor {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != 2:
            raise InputError(f"{self.folder}: tensor {name} has shape {list(shape)}, no matrix")
        return shape

    def _refuse_other_drafters(self) -> None:
        kind = None
        if "mask_hidden" in self.tensors or self.config.get("parallel_drafting"):
            kind = "P-EAGLE"
        elif "dflash_config" in self.config or {"mask_token_id", "block_size"} <= set(self.config):
            kind = "DFlash"
        if kind is not None:
            raise InputError(
                f"{self.folder} is a {kind} head, which apb does not run: choose an EAGLE-1, "
                "EAGLE-2 or EAGLE-3 head"
            )

    def _refuse_numbers_other_than_floats(self) -> None:
        for name, tensor in self.tensors.items():
            if name not in _MAPS and tensor.dtype not in (
                *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
            ):
                raise InputError(
                    f"{self.folder}: tensor {name} holds {tensor.dtype}, which apb does not read: "
                    "choose a head that is not quantised"
                )


def canonical_name(name: str) -> str:
    name = name.removeprefix("model.")
    for prefix, instead in _PREFIXES.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return _NAMES.get(name, name)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is no EAGLE head: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object")
    return config


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Of all files; safetensors come first where there are both."""
    for pattern, load in (("*.safetensors", _safetensors), ("*.bin", _pickled)):
        if paths := sorted(folder.glob(pattern)):
            for path in paths:
                yield from load(path).items()
            return
    raise InputError(f"{folder} holds no weights: it has no *.safetensors and no *.bin file")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file") from error


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails with any exception
        raise InputError(
            f"{path} cannot be read as weights: it is truncated or damaged, or holds objects that "
            "apb does not unpickle because they could run code"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise InputError(f"{path} holds something other than named tensors")
    return loaded


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
