"""Picking some tensors out of checkpoints, sharded or not, without reading the others."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apb.errors import InputError

_PICKLES = (".bin", ".pt", ".pth")
_PATTERNS = ("*.safetensors", *(f"*{suffix}" for suffix in _PICKLES))


class NamedWeight(NamedTuple):
    """A tensor and where it is from."""

    file: Path
    name: str
    tensor: Tensor


def read_weights(
    path: str | Path, is_wanted: Callable[[str], bool]
) -> tuple[list[NamedWeight], Mapping[str, str]]:
    """The tensors with a wanted name, and the metadata where all are in one safetensors file.

    `path` is a ``.safetensors``, ``.bin`` or ``.pt`` file or a folder of them; a folder's index
    says which shards hold what, and safetensors come first where there are both. Pickles are read
    with torch's `weights_only`.

    Raises:
        InputError: nothing there, or a file is missing or damaged.
    """
    path = Path(path).expanduser()
    files = _files(path, is_wanted)
    weights: list[NamedWeight] = []
    metadata: Mapping[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            of_file, metadata = _safetensors(file, is_wanted)
        else:
            of_file = _pickled(file, is_wanted)
        weights += of_file
    return weights, metadata if len(files) == 1 else {}


def _files(path: Path, is_wanted: Callable[[str], bool]) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".safetensors", *_PICKLES):
            raise InputError(f"{path} is no weights file: give .safetensors, .bin or .pt")
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist: give a file or a folder of weights")
    for pattern in _PATTERNS:
        if files := sorted(path.glob(pattern)):
            indices = sorted(path.glob(f"{pattern}.index.json"))
            return _shards(indices[0], is_wanted) if indices else files
    raise InputError(f"{path} holds no weights: it has no {' or '.join(_PATTERNS)} file")


def _shards(index: Path, is_wanted: Callable[[str], bool]) -> list[Path]:
    """Those that hold something wanted."""
    try:
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted({shards[name] for name in shards if is_wanted(name)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} cannot be read as an index of weights: {error}") from error
    for name in names:
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is missing: complete the download")
    return [index.parent / name for name in names]


def _safetensors(
    file: Path, is_wanted: Callable[[str], bool]
) -> tuple[list[NamedWeight], Mapping[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if is_wanted(name)]  # noqa: SIM118
            weights = [NamedWeight(file, name, opened.get_tensor(name)) for name in names]
            return weights, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or no safetensors file: fetch it again") from error


def _pickled(file: Path, is_wanted: Callable[[str], bool]) -> list[NamedWeight]:
    try:
        loaded: Any = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # a damaged pickle fails with any exception
        raise InputError(
            f"{file} cannot be read as weights: it is truncated or damaged, or holds objects that "
            "apb does not unpickle because they could run code"
        ) from error
    return [NamedWeight(file, name, tensor) for name, tensor in _named(loaded, file, is_wanted)]


def _named(
    loaded: Any, file: Path, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds something other than named tensors")
    for name, tensor in loaded.items():
        if isinstance(name, str) and is_wanted(name):
            if not isinstance(tensor, Tensor):
                raise InputError(f"{file}: {name} is no tensor")
            yield name, tensor
