"""`model.sha256`: a model whose files are not those of the list is refused before it is read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apb.errors import InputError
from apb.hf.model import CausalLM
from apb.model_config import ModelConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = AutoConfig.for_model(
        "llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def manifest(folder: Path) -> Path:
    """The list as coreutils writes it."""
    names = sorted(path.name for path in folder.iterdir())
    listed = subprocess.run(
        ["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True
    )
    path = folder.parent / "SHA256SUMS"
    path.write_text(listed.stdout)
    return path


def load(folder: Path, manifest: Path) -> None:
    config = ModelConfig(path=str(folder), sha256=str(manifest))
    CausalLM.load(config, dtype=torch.float32, device=torch.device("cpu"))


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_the_files_of_the_list_load(folder: Path, manifest: Path) -> None:
    load(folder, manifest)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_flipped_bit_in_the_weights_is_found_by_one_rank_of_a_machine(
    folder: Path, manifest: Path, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_last_byte(folder / "model.safetensors")
    found = []
    for rank in range(parts):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(parts))
        try:
            load(folder, manifest)
        except InputError as error:
            found.append(str(error))
    assert len(found) == 1
    assert f"{folder}/model.safetensors is not the file that model.sha256 lists" in found[0]


def test_weights_that_are_not_listed_are_refused(folder: Path, manifest: Path) -> None:
    kept = [line for line in manifest.read_text().splitlines() if "safetensors" not in line]
    manifest.write_text("\n".join(kept))
    with pytest.raises(InputError, match=r"does not list .*model\.safetensors"):
        load(folder, manifest)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0" * 64 + "  tokenizer.json\n", "tokenizer.json, which cannot be read"),
        ("nonsense\n", "is no list of digests"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    folder: Path, manifest: Path, line: str, words: str
) -> None:
    manifest.write_text(manifest.read_text() + line)
    with pytest.raises(InputError, match=words):
        load(folder, manifest)


def test_a_missing_list_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.sha256=.*nowhere cannot be read"):
        load(folder, folder / "nowhere")
