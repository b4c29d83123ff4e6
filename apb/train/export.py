"""Writing a trained head: EAGLE-2's layout, with a card that says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def write_head(
    folder: Path, head: nn.Module, config: Mapping[str, Any], card: str, *, dtype: torch.dtype
) -> None:
    """``config.json``, ``model.safetensors`` and ``README.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    weights = {name: value.to(dtype).contiguous() for name, value in head.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text(card)


def head_config(target: Any, *, intermediate_size: int, tokenizer_hash: str) -> dict[str, Any]:
    """The configuration of an EAGLE-2 head for a Hugging Face configuration of a target."""
    heads = target.num_attention_heads
    return {
        "architectures": ["LlamaForCausalLMEagle"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": target.hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": getattr(target, "head_dim", None) or target.hidden_size // heads,
        "num_hidden_layers": 1,
        "rms_norm_eps": target.rms_norm_eps,
        "vocab_size": target.vocab_size,
        "bias": False,
        "tokenizer_hash": tokenizer_hash,
    }
