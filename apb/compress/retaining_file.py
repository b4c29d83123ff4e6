"""Retaining heads as files: the published layouts and apb's own, read strictly.

Letters: R hidden size of a head, I its inputs (H query, K key and K value vectors of D elements).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from apb.compress.weight_files import NamedWeight, read_weights
from apb.cost import ModelShape
from apb.errors import InputError
from apb.files import written_whole

FILE_NAME = "retaining_heads.safetensors"
"""Of a model's heads where apb looks for them by itself."""
_KIND = "apb retaining heads"
_NAME = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.self_attn\.(fc[^.]*\..+)")
_PARTS = ("fc1.weight", "fc2.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class RetainingHead(NamedTuple):
    """The MLP that scores one layer's tokens (APB, section 3.4), without biases."""

    fc1_RI: Tensor
    fc2_KR: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RetainingHeads:
    """One head per layer of a model.

    Attributes:
        model: whose they are, where that is known.
        activation: Hugging Face's name of it; None is the model's own.
        note: how they were made, in words.
    """

    layers: tuple[RetainingHead, ...]
    model: str | None = None
    activation: str | None = None
    note: str = ""

    @property
    def hidden_size(self) -> int:
        return len(self.layers[0].fc1_RI)

    @property
    def sha256(self) -> str:
        """Of the weights in the order of the layers, in the dtype they have."""
        digest = hashlib.sha256()
        for head in self.layers:
            for weight in head:
                digest.update(weight.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @classmethod
    def read(cls, path: str | Path, shape: ModelShape) -> RetainingHeads:
        """Heads on the CPU, in the dtype they are stored in.

        `path` is a file or folder as Locret and APB publish them (``thunlp/APB-Locret-*``), alone
        or among a whole model's weights, or what `write` has written. Nothing but the tensors of
        the heads is read.

        Raises:
            InputError: nothing there, damaged, or not exactly the heads of a model of that shape.
        """
        weights, metadata = read_weights(path, lambda name: _NAME.fullmatch(name) is not None)
        if not weights:
            raise InputError(
                f"{path} holds no retaining heads: it has no tensor named "
                "...layers.0.self_attn.fc1.weight"
            )
        found = _by_layer(weights)
        _check_layers(found, shape, path)
        layers = tuple(
            _checked(found.get(idx), idx, shape, path) for idx in range(shape.num_layers)
        )
        _check_hidden_sizes(layers, found)
        heads = cls(layers)
        if metadata.get("kind") != _KIND:
            return heads
        if metadata.get("sha256") != heads.sha256:
            raise InputError(
                f"{path} is damaged: its weights do not have the sha256 that it states; copy or "
                "convert the heads again"
            )
        return cls(
            layers, metadata.get("model"), metadata.get("activation"), metadata.get("note", "")
        )

    def write(self, path: str | Path) -> None:
        """One safetensors file, whole or not at all.

        Raises:
            InputError: it cannot be written there.
        """
        path = checked_output(path)
        tensors = {
            f"layers.{idx}.self_attn.{part}": weight.contiguous()
            for idx, head in enumerate(self.layers)
            for part, weight in zip(_PARTS, head, strict=True)
        }
        metadata = {
            "kind": _KIND,
            "model": self.model or "",
            "hidden_size": str(self.hidden_size),
            "inputs": "q, k, v before RoPE",
            "activation": self.activation or "",
            "note": self.note,
            "sha256": self.sha256,
        }
        filled = {key: value for key, value in metadata.items() if value}
        try:
            with written_whole(path) as scratch:
                scratch.write_bytes(safetensors.torch.save(tensors, filled))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error


def checked_output(name: str | Path) -> Path:
    """Where heads can be written. Raises InputError."""
    path = Path(name).expanduser()
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name for retaining heads: it has to end in .safetensors")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"{path} cannot be written: give a file in a folder that exists and can be written to"
        )
    return path


def num_inputs(shape: ModelShape) -> int:
    """Elements of the q, k and v of one token."""
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


def _by_layer(weights: Sequence[NamedWeight]) -> dict[int, dict[str, NamedWeight]]:
    found: dict[int, dict[str, NamedWeight]] = {}
    for weight in weights:
        match = _NAME.fullmatch(weight.name)
        assert match is not None, "only names of heads are read"
        parts = found.setdefault(int(match[1]), {})
        if match[2] not in _PARTS:
            raise InputError(
                f"{weight.file}: a retaining head has {' and '.join(_PARTS)} and nothing else, so "
                f"apb does not know tensor {weight.name} {list(weight.tensor.shape)}"
            )
        if match[2] in parts:
            other = parts[match[2]]
            raise InputError(
                f"{weight.file}: tensor {weight.name} was in {other.file} already, as {other.name}"
            )
        parts[match[2]] = weight
    return found


def _check_layers(
    found: Mapping[int, Mapping[str, NamedWeight]], shape: ModelShape, path: str | Path
) -> None:
    highest = max(found)
    if highest >= shape.num_layers:
        weight = next(iter(found[highest].values()))
        raise InputError(
            f"{weight.file} is of another model: it has tensor {weight.name}, and this model has "
            f"{shape.num_layers} layers, 0 to {shape.num_layers - 1}"
        )
    if len(found) < shape.num_layers and highest + 1 == len(found):
        raise InputError(
            f"{path} has heads for {len(found)} layers, and this model has {shape.num_layers}: "
            "they are of another model, or a file is missing"
        )


def _checked(
    parts: Mapping[str, NamedWeight] | None, idx: int, shape: ModelShape, path: str | Path
) -> RetainingHead:
    """A layer's head, of the sizes that the model asks for."""
    hidden_size: int | str = "hidden size"
    tensors = []
    for part in _PARTS:
        inputs = num_inputs(shape)
        is_first = part == _PARTS[0]
        wanted = [hidden_size, inputs] if is_first else [shape.num_kv_heads, hidden_size]
        if (weight := (parts or {}).get(part)) is None:
            raise InputError(f"{path} lacks tensor layers.{idx}.self_attn.{part} {_sizes(wanted)}")
        found = list(weight.tensor.shape)
        if is_first and len(found) == 2 and found[0] > 0:
            wanted[0] = hidden_size = found[0]
        if found != wanted:
            raise InputError(
                f"{weight.file}: tensor {weight.name} is {found} instead of {_sizes(wanted)}, "
                f"which a model with {shape.num_heads} query and {shape.num_kv_heads} key/value "
                f"heads of {shape.head_dim} needs: these heads are of another model"
            )
        _check_numbers(weight)
        tensors.append(weight.tensor)
    return RetainingHead(*tensors)


def _sizes(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _check_numbers(weight: NamedWeight) -> None:
    if weight.tensor.dtype not in _FLOATS:
        raise InputError(
            f"{weight.file}: tensor {weight.name} holds {weight.tensor.dtype}, which apb does not "
            "read: give heads that are not quantised"
        )
    if not weight.tensor.isfinite().all():
        raise InputError(
            f"{weight.file}: tensor {weight.name} holds NaN or infinity: the file is damaged or "
            "its training diverged"
        )


def _check_hidden_sizes(
    layers: Sequence[RetainingHead], found: Mapping[int, Mapping[str, NamedWeight]]
) -> None:
    for idx, head in enumerate(layers):
        if len(head.fc1_RI) != len(layers[0].fc1_RI):
            weight = found[idx][_PARTS[0]]
            raise InputError(
                f"{weight.file}: tensor {weight.name} is {list(head.fc1_RI.shape)} instead of "
                f"{list(layers[0].fc1_RI.shape)}, as in layer 0: the files are of different heads"
            )
