"""Tiny random models for tests, and the Hugging Face `sdpa` model with the same weights.

Weights are drawn wide enough that attention is far from uniform, and biases and norm weights are
drawn as well: left at 0 and 1 they would hide an attention that ignores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from apb.compress.base import CompressorTarget
from apb.config import named_model
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.hf.compressor_target import compressor_target
from apb.hf.model import CausalLM, load_config
from apb.hf.target import HfTarget
from apb.hf.tokenizer import load_tokenizer, stop_ids
from apb.model_config import ModelConfig

VOCAB = 260
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "num_hidden_layers": 3},
    "qwen2": {**_COMMON, "model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 3},
    "qwen3": {**_COMMON, "model_type": "qwen3", "num_key_value_heads": 1},
}
NAMES = tuple(ARCHITECTURES)


def model_config(name: str) -> ModelConfig:
    """Of a tiny model, or of one in `conf/model/`."""
    if name not in ARCHITECTURES:
        return named_model(name)
    return ModelConfig(name=name, architecture=ARCHITECTURES[name])


@cache
def apb_model(name: str) -> CausalLM:
    """The model as apb runs it; one per process."""
    model = CausalLM.load(model_config(name), dtype=torch.float32, device=torch.device("cpu"))
    if name in ARCHITECTURES:
        _randomise_vectors(model._model)
    return model


def compressor_target_of(name: str) -> CompressorTarget:
    """The model as compressors see it."""
    config = model_config(name)
    return compressor_target(
        config, load_config(config), device=torch.device("cpu"), dtype=torch.float32
    )


@cache
def draft_target(name: str) -> HfTarget:
    """The model as drafters see it."""
    if name in ARCHITECTURES:
        return HfTarget(apb_model(name), byte_tokenizer(), frozenset({257}), named=named_model)
    config = model_config(name)
    tokenizer = load_tokenizer(config)
    stops = stop_ids(config, load_config(config), tokenizer)
    return HfTarget(apb_model(name), tokenizer, stops, config.drafting_folder, named_model)


@cache
def hf_model(name: str) -> PreTrainedModel:
    """The oracle: the same weights under transformers' own `sdpa` attention."""
    config = load_config(model_config(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_config(name).weights_seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    _randomise_vectors(model)
    model.eval().requires_grad_(False)
    return model


def _randomise_vectors(model: PreTrainedModel) -> None:
    """Biases around 0 and norm weights around 1, the same for the same architecture."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                centre = 0.0 if name.endswith("bias") else 1.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(centre + 0.3 * noise)


@torch.inference_mode()
def hf_logits(name: str, token_ids: Sequence[int]) -> Tensor:
    """The oracle's logits ``[T, V]`` of a plain causal forward pass."""
    logits: Tensor = hf_model(name)(input_ids=torch.tensor([list(token_ids)])).logits[0]
    return logits


@torch.inference_mode()
def hf_keys_values(name: str, token_ids: Sequence[int]) -> Tensor:
    """The oracle's KV cache ``[L, 2, K, S, D]`` of a plain causal forward pass, keys after RoPE."""
    output = hf_model(name)(input_ids=torch.tensor([list(token_ids)]), use_cache=True)
    layers = output.past_key_values.layers
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])


def random_ids(length: int, *, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())
