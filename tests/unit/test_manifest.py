"""`model.sha256`: a model whose files are not those of the list is refused before it is read."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apb.errors import InputError
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.hf.draft_model import load_draft_model
from apb.hf.model import CausalLM
from apb.hf.tokenizer import vocabulary_hash
from apb.launchers.processes import start_rank
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


def is_found_by(ranks: Sequence[dict[str, str]], folder: Path, manifest: Path) -> int:
    """How many ranks, given their environments, refuse the weights for their digest."""
    found = []
    for environment in ranks:
        with patch.dict("os.environ", environment):
            try:
                load(folder, manifest)
            except InputError as error:
                found.append(str(error))
    expected = f"{folder}/model.safetensors is not the file that model.sha256 lists"
    assert all(expected in error for error in found)
    return len(found)


def test_the_files_of_the_list_load(folder: Path, manifest: Path) -> None:
    load(folder, manifest)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_flipped_bit_in_the_weights_is_found_by_one_rank_of_a_machine(
    folder: Path, manifest: Path, parts: int
) -> None:
    flip_last_byte(folder / "model.safetensors")
    ranks = [{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(parts)} for rank in range(parts)]
    assert is_found_by(ranks, folder, manifest) == 1


@pytest.mark.parametrize("left", [[0, 2], [1, 2], [2]])
def test_ranks_that_are_left_of_more_check_every_file(
    folder: Path, manifest: Path, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local ranks after ``on_rank_loss=degrade``, which keep their GPUs."""
    told: list[dict[str, str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: told.append(env))
    for rank, gpu in enumerate(left):
        start_rank(rank, len(left), gpu).connection.close()
    flip_last_byte(folder / "model.safetensors")
    assert is_found_by(told, folder, manifest) == 1


def test_a_local_rank_without_the_number_of_its_neighbours_checks_everything(
    folder: Path, manifest: Path
) -> None:
    flip_last_byte(folder / "model.safetensors")
    assert is_found_by([{"LOCAL_RANK": "3"}], folder, manifest) == 1


def test_a_draft_model_is_checked_by_the_one_rank_that_loads_it(
    folder: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_tokenizer().save_pretrained(folder)
    flip_last_byte(folder / "model.safetensors")
    config = ModelConfig(name="small", path=str(folder), sha256=str(manifest))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(InputError, match=r"model\.safetensors is not the file"):
            load_draft_model(
                config,
                dtype=torch.float32,
                device=torch.device("cpu"),
                tokenizer_hash=vocabulary_hash(byte_tokenizer()),
                sinks=4,
                window=64,
                spare=8,
            )


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
