"""Guarantees of RoPE: transformers' own, it can be taken off, and a configuration tells it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from apb.compress.base import BlockView
from apb.errors import InputError
from apb.hf.compressor_target import compressor_target, rotary_of
from apb.hf.model import CausalLM, load_config
from apb.model_config import ModelConfig
from apb.rotary import Rotary
from models import ARCHITECTURES

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def model_config(kind: str, **changes: Any) -> ModelConfig:
    rope = {"rope_theta": 5000.0, **KINDS[kind]}
    return ModelConfig(
        name="some", architecture={**ARCHITECTURES["llama"], "rope_parameters": rope, **changes}
    )


@over_kinds
def test_configuration_tells_the_rotary_embedding_of_the_loaded_model(kind: str) -> None:
    config = model_config(kind)
    loaded = CausalLM.load(config, dtype=torch.float32, device=CPU).hf.base_model.rotary_emb
    found = rotary_of(load_config(config))
    assert torch.equal(found.inv_freq_F, loaded.inv_freq)
    assert found.scaling == loaded.attention_scaling
    assert (found.scaling != 1) == (kind == "yarn")


@over_kinds
def test_rotation_is_that_of_transformers_and_can_be_taken_off(kind: str) -> None:
    config = model_config(kind)
    rotary = rotary_of(load_config(config))
    embedding = CausalLM.load(config, dtype=torch.float32, device=CPU).hf.base_model.rotary_emb
    positions_T = torch.tensor([0, 1, 5, 999, 131_071])
    x_HTD = torch.randn(3, 5, 16)
    cos_1TD, sin_1TD = embedding(x_HTD, positions_T[None])
    expected, _ = apply_rotary_pos_emb(x_HTD[None], x_HTD[None], cos_1TD, sin_1TD)
    rotation = rotary.at(positions_T)
    rotated_HTD = rotation.rotate(x_HTD)
    assert torch.equal(rotated_HTD, expected[0])
    torch.testing.assert_close(rotation.unrotate(rotated_HTD), x_HTD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [slice(None), slice(3, 7), slice(8, 40)])
def test_block_shows_its_rows_as_rope_got_them(rows: slice) -> None:
    rotary, start = Rotary(torch.tensor([1.0, 0.3, 0.01]), 1.2), 1234
    q_HSD, k_KSD = torch.randn(4, 10, 6), torch.randn(2, 10, 6)
    rotation = rotary.at(torch.arange(start, start + 10))
    block = BlockView(
        layer_idx=0,
        block_idx=1,
        start=start,
        q_HSD=rotation.rotate(q_HSD).double(),
        k_KSD=rotation.rotate(k_KSD).double(),
        v_KSD=torch.randn(2, 10, 6),
        scale=0.4,
    )
    found = block.before_rope(rotary, rows)
    for before, expected in zip(found, (q_HSD, k_KSD), strict=True):
        assert before.dtype == torch.float32
        torch.testing.assert_close(before, expected[:, rows], atol=1e-4, rtol=1e-4)


def test_rope_on_a_part_of_each_head_is_refused_only_where_it_has_to_be_undone() -> None:
    config = model_config("linear")
    assert config.architecture is not None
    config.architecture["rope_parameters"]["partial_rotary_factor"] = 0.5
    target = compressor_target(config, load_config(config), device=CPU, dtype=torch.float32)
    with pytest.raises(InputError, match=r"compressor=some_head needs RoPE on whole .* 8 of 16 "):
        target.require_whole_rotary("some_head")


@pytest.mark.parametrize(("name", "ships"), [("smollm2-135m", True), ("nothing", False)])
def test_target_knows_what_is_shipped_for_the_model_of_its_name(name: str, ships: bool) -> None:
    config = model_config("default")
    config.name = name
    target = compressor_target(config, load_config(config), device=CPU, dtype=torch.float32)
    assert (target.shipped is not None and target.shipped.is_dir()) == ships
