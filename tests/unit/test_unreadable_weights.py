"""Weights that are cut off, no weights, or another model's: one sentence, whoever noticed first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apb.errors import InputError
from apb.hf.model import CausalLM
from apb.model_config import ModelConfig
from models import hf_model


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def never_fetched(folder: Path) -> None:
    """What git leaves where the large files were not fetched."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)


def of_a_narrower_model(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path) -> CausalLM:
    config = ModelConfig(path=str(path))
    return CausalLM.load(config, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "cannot load .*: Error while deserializing header"),
        (never_fetched, "cannot load .*: Error while deserializing header"),
        (of_a_narrower_model, r"mlp.down_proj.weight as \(64, 96\) where .* says \(64, 64\)"),
    ],
)
def test_spoilt_weights_are_bad_input(
    folder: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=words) as raised:
        load(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_gguf_file_that_is_cut_off_is_bad_input(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\3\0\0\0\1")
    with pytest.raises(InputError, match="cannot read a model"):
        load(path)


def test_too_little_memory_is_not_the_weights_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(torch.OutOfMemoryError):
        load(folder)
