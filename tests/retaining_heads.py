"""Retaining heads with random weights, under the names that Locret and APB publish them with."""

from __future__ import annotations

import torch
from torch import Tensor

from apb.compress.base import CompressorTarget
from apb.compress.retaining_file import RetainingHead, RetainingHeads, num_inputs
from apb.config import compose_config
from apb.cost import ModelShape
from apb.hf.compressor_target import compressor_target
from apb.hf.model import load_config
from apb.hf.shape import model_shape
from models import model_config


def random_heads(shape: ModelShape, *, hidden_size: int, seed: int = 0) -> RetainingHeads:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        weight: Tensor = torch.randn(rows, columns, generator=generator) / columns**0.5
        return weight

    return RetainingHeads(
        tuple(
            RetainingHead(
                draw(hidden_size, num_inputs(shape)), draw(shape.num_kv_heads, hidden_size)
            )
            for _ in range(shape.num_layers)
        )
    )


def published(heads: RetainingHeads, *, prefix: str = "model.") -> dict[str, Tensor]:
    """The tensors of a ``thunlp/APB-Locret-*`` repository."""
    return {
        f"{prefix}layers.{idx}.self_attn.{part}.weight": weight
        for idx, head in enumerate(heads.layers)
        for part, weight in zip(("fc1", "fc2"), head, strict=True)
    }


def target_of(name: str) -> CompressorTarget:
    config = model_config(name)
    return compressor_target(
        config, load_config(config), device=torch.device("cpu"), dtype=torch.float32
    )


def tiny_shape() -> ModelShape:
    """Of the configuration `tiny`, which commands and `LLM` take by its name."""
    return model_shape(load_config(compose_config(["+model=tiny"]).model))
