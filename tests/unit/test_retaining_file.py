"""Guarantees of files of retaining heads: every published layout is read, and nothing that does not
fit the model to the last tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from apb.compress.retaining_file import RetainingHeads
from apb.cost import ModelShape
from apb.errors import InputError
from apb.heads import main
from plans import LLAMA_8B
from retaining_heads import published, random_heads, tiny_shape

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=48,
    intermediate_size=96,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    vocab_size=260,
)
HEADS = random_heads(SHAPE, hidden_size=10)
Tensors = dict[str, Tensor]


def assert_same(left: RetainingHeads, right: RetainingHeads) -> None:
    for mine, theirs in zip(left.layers, right.layers, strict=True):
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True)
        )


def write_sharded(folder: Path, shards: dict[str, Tensors]) -> None:
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / name)
    names = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)


def whole_model() -> dict[str, Tensors]:
    """Two shards with other weights, of which the last holds no head."""
    tensors = published(HEADS)
    first = {name: tensor for name, tensor in tensors.items() if "layers.2" not in name}
    rest = {name: tensor for name, tensor in tensors.items() if "layers.2" in name}
    others = {
        "model.embed_tokens.weight": torch.ones(4, 2),
        "model.layers.0.mlp.fc1.weight": torch.ones(10, 96),
    }
    return {
        "a.safetensors": {**first, **others},
        "b.safetensors": rest,
        "c.safetensors": {"x": torch.ones(1)},
    }


def as_file(folder: Path) -> Path:
    safetensors.torch.save_file(published(HEADS), folder / "heads.safetensors")
    return folder / "heads.safetensors"


def as_pickle(folder: Path) -> Path:
    torch.save(published(HEADS), folder / "pytorch_model.bin")
    return folder


def as_old_pickle(folder: Path) -> Path:
    tensors = published(HEADS, prefix="base_model.model.model.")
    torch.save(tensors, folder / "fc.pt", _use_new_zipfile_serialization=False)
    return folder / "fc.pt"


def as_shards(folder: Path) -> Path:
    write_sharded(folder, whole_model())
    return folder


def as_shards_without_index(folder: Path) -> Path:
    for name, tensors in whole_model().items():
        safetensors.torch.save_file(tensors, folder / name)
    return folder


def as_bare_layers(folder: Path) -> Path:
    safetensors.torch.save_file(published(HEADS, prefix=""), folder / "fc.safetensors")
    return folder


@pytest.mark.parametrize(
    "write",
    [as_file, as_pickle, as_old_pickle, as_shards, as_shards_without_index, as_bare_layers],
)
def test_published_layouts_are_read(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert_same(RetainingHeads.read(write(tmp_path), SHAPE), HEADS)


def test_shards_without_heads_need_not_be_there(tmp_path: Path) -> None:
    write_sharded(tmp_path, whole_model())
    (tmp_path / "c.safetensors").unlink()
    assert_same(RetainingHeads.read(tmp_path, SHAPE), HEADS)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return apply


def without(*names: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return apply


def adding(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name] = tensor

    return apply


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        damaged = weight.clone()
        damaged[1, 1] = value
        return damaged

    return change


FC1, FC2 = "model.layers.1.self_attn.fc1.weight", "model.layers.1.self_attn.fc2.weight"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (without(FC1), r"lacks tensor layers.1.self_attn.fc1.weight \[hidden size, 96\]"),
        (without(FC2), r"lacks tensor layers.1.self_attn.fc2.weight \[3, 10\]"),
        (without(FC1, FC2), r"lacks tensor layers.1.self_attn.fc1.weight"),
        (
            without(*(name.replace("1", "2", 1) for name in (FC1, FC2))),
            "heads for 2 layers, and this model has 3",
        ),
        (adding(FC1.replace("1", "3", 1), torch.ones(10, 96)), "fc1.weight, and this model has 3"),
        (adding(FC1.replace("weight", "bias"), torch.ones(10)), r"fc1.bias \[10\]"),
        (adding(FC1.replace("fc1", "fc3"), torch.ones(10, 10)), r"fc3.weight \[10, 10\]"),
        (adding(FC1.replace("model.", ""), torch.ones(10, 96)), "was in .* already, as layers.1"),
        (changed(FC1, lambda x: x[:, :-8]), r"is \[10, 88\] instead of \[10, 96\], which a model"),
        (changed(FC1, lambda x: x[0]), r"is \[96\] instead of \[hidden size, 96\]"),
        (changed(FC2, lambda x: x[:2]), r"is \[2, 10\] instead of \[3, 10\]"),
        (changed(FC2, lambda x: x[:, 1:]), r"is \[3, 9\] instead of \[3, 10\]"),
        (changed(FC1, with_one(float("nan"))), "fc1.weight holds NaN or infinity"),
        (changed(FC2, with_one(float("inf"))), "fc2.weight holds NaN or infinity"),
        (changed(FC2, lambda x: x.to(torch.int8)), "holds torch.int8, which apb does not read"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    break_it: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    tensors = published(HEADS)
    break_it(tensors)
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(InputError, match=words) as caught:
        RetainingHeads.read(tmp_path, SHAPE)
    assert "\n" not in str(caught.value)


def test_layers_of_different_hidden_sizes_are_refused(tmp_path: Path) -> None:
    tensors = published(HEADS)
    other = random_heads(SHAPE, hidden_size=12)
    tensors |= {name: tensor for name, tensor in published(other).items() if "layers.2" in name}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"is \[12, 96\] instead of \[10, 96\], as in layer 0"):
        RetainingHeads.read(tmp_path, SHAPE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 2}, "this model has 2 layers"),
        ({"num_kv_heads": 2, "num_heads": 8}, "2 key/value heads"),
        ({"head_dim": 4}, "heads of 4 needs"),
    ],
)
def test_heads_of_another_model_are_refused(
    change: dict[str, int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        RetainingHeads.read(as_file(tmp_path), SHAPE._replace(**change))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: folder, "holds no weights"),
        (lambda folder: _text(folder / "heads.txt", ""), "is no weights file"),
        (lambda folder: _text(folder / "x.safetensors", "no"), "truncated or no safetensors"),
        (lambda folder: _text(folder / "x.bin", "no"), "truncated or damaged, or holds objects"),
        (lambda folder: _saved(folder / "x.pt", [1, 2]), "other than named tensors"),
        (lambda folder: _saved(folder / "x.pt", {FC1: 1}), "is no tensor"),
        (
            lambda folder: _saved(folder / "x.pt", {"fc1": torch.ones(1)}),
            "holds no retaining heads",
        ),
        (lambda folder: _saved(folder / "x.pt", Path("x")), "could run code"),
    ],
)
def test_files_that_are_no_heads_are_one_sentence(
    prepare: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        RetainingHeads.read(prepare(tmp_path), SHAPE)


def _text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_a_missing_shard_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, whole_model())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"names b\.safetensors, which is missing"):
        RetainingHeads.read(tmp_path, SHAPE)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as an index"):
        RetainingHeads.read(tmp_path, SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_again(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = tuple(type(head)(*(weight.to(dtype) for weight in head)) for head in HEADS.layers)
    heads = RetainingHeads(layers, model="m", activation="gelu", note="by hand")
    heads.write(tmp_path / "heads.safetensors")
    again = RetainingHeads.read(tmp_path / "heads.safetensors", SHAPE)
    assert_same(again, heads)
    assert (again.model, again.activation, again.note) == ("m", "gelu", "by hand")
    assert [path.name for path in tmp_path.iterdir()] == ["heads.safetensors"]


def test_weights_that_were_changed_do_not_have_their_sha256(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    HEADS.write(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="do not have the sha256"):
        RetainingHeads.read(path, SHAPE)


def test_the_layout_of_llama_8b_is_known_at_its_true_size(tmp_path: Path) -> None:
    """One layer at full size and the sizes of all others from the file's header alone."""
    one_layer = LLAMA_8B._replace(num_layers=1)
    heads = random_heads(one_layer, hidden_size=1024)
    tensors = published(heads)
    assert [list(tensor.shape) for tensor in tensors.values()] == [[1024, 6144], [8, 1024]]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(RetainingHeads.read(tmp_path, one_layer), heads)
    with pytest.raises(InputError, match="heads for 1 layers, and this model has 32"):
        RetainingHeads.read(tmp_path, LLAMA_8B)


def test_the_command_converts_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tiny_shape()
    heads = random_heads(tiny, hidden_size=6)
    torch.save(published(heads), tmp_path / "fc.bin")
    output = tmp_path / "heads.safetensors"
    arguments = ["+model=tiny", f"source={tmp_path / 'fc.bin'}"]
    assert main(["convert", *arguments, f"output={output}"]) == 0
    converted = RetainingHeads.read(output, tiny)
    assert_same(converted, heads)
    assert (converted.model, converted.activation) == ("tiny", "silu")
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["hidden_size"] == "6"
    capsys.readouterr()
    assert main(["show", "+model=tiny", f"source={output}"]) == 0
    assert metadata["sha256"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say `convert` or `show` first"),
        (["show", "+model=tiny"], "source= is needed"),
        (["convert", "+model=tiny", "source=x"], "output= is needed"),
        (["convert", "+model=tiny", "source=x", "output=x.pt"], "has to end in .safetensors"),
        (["convert", "+model=tiny", "source=x", "output=/no/x.safetensors"], "cannot be written"),
        (["show", "+model=tiny", "source=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_bad_input_of_the_command_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    heads = replace(random_heads(tiny_shape(), hidden_size=6), activation="tanh")
    heads.write(tmp_path / "heads.safetensors")
    assert main(["show", "+model=tiny", f"source={tmp_path / 'heads.safetensors'}"]) == 2
