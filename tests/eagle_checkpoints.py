"""Tiny EAGLE heads with random weights, written in the layouts of those who publish heads.

Weights are drawn wide, so that what a head drafts depends on every part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 96, 4, 2, 16

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """Tensors under the names of the EAGLE repository, and the settings that go with them."""

    tensors: Tensors
    config: Mapping[str, Any]
    file: str = "model.safetensors"

    def renamed(self, rename: Callable[[str], str]) -> Head:
        return replace(self, tensors={rename(name): t for name, t in self.tensors.items()})

    def configured(self, **config: Any) -> Head:
        return replace(self, config={**self.config, **config})

    def without(self, *names: str) -> Head:
        tensors = {name: t for name, t in self.tensors.items() if name not in names}
        return replace(self, tensors=tensors)

    def adding(self, **tensors: Tensor) -> Head:
        return replace(self, tensors={**self.tensors, **tensors})

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.file.endswith(".bin"):
            torch.save(self.tensors, folder / self.file)
        else:
            safetensors.torch.save_file(self.tensors, folder / self.file)
        return folder


def _layer(hidden_size: int, width: int, prefix: str, draw: Callable[..., Tensor]) -> Tensors:
    q_size, kv_size = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    return {
        f"{prefix}.self_attn.q_proj.weight": draw(q_size, width),
        f"{prefix}.self_attn.k_proj.weight": draw(kv_size, width),
        f"{prefix}.self_attn.v_proj.weight": draw(kv_size, width),
        f"{prefix}.self_attn.o_proj.weight": draw(hidden_size, q_size),
        f"{prefix}.mlp.gate_proj.weight": draw(INTERMEDIATE, hidden_size),
        f"{prefix}.mlp.up_proj.weight": draw(INTERMEDIATE, hidden_size),
        f"{prefix}.mlp.down_proj.weight": draw(hidden_size, INTERMEDIATE),
        f"{prefix}.post_attention_layernorm.weight": 1 + draw(hidden_size),
    }


def _drawing(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.2 * torch.randn(*shape, generator=generator)


def _config(hidden_size: int, vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "max_position_embeddings": 2048,
        "vocab_size": vocab_size,
    }


def eagle2_head(*, hidden_size: int = 64, vocab_size: int, seed: int = 0) -> Head:
    """EAGLE-1/2 with the bias that its config asks for where it says nothing."""
    draw = _drawing(seed)
    tensors = {
        "fc.weight": draw(hidden_size, 2 * hidden_size),
        "fc.bias": draw(hidden_size),
        **_layer(hidden_size, hidden_size, "layers.0", draw),
    }
    return Head(tensors, _config(hidden_size, vocab_size), "pytorch_model.bin")


def eagle3_head(
    *, hidden_size: int = 64, vocab_size: int, num_scored: int, num_states: int = 3, seed: int = 0
) -> Head:
    """EAGLE-3 with a vocabulary of its own."""
    draw = _drawing(seed)
    ids_C = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:num_scored]
    ids_C = ids_C.sort().values
    is_scored_V = torch.zeros(vocab_size, dtype=torch.bool)
    is_scored_V[ids_C] = True
    tensors = {
        "fc.weight": draw(hidden_size, num_states * hidden_size),
        **_layer(hidden_size, 2 * hidden_size, "midlayer", draw),
        "midlayer.hidden_norm.weight": 1 + draw(hidden_size),
        "midlayer.input_layernorm.weight": 1 + draw(hidden_size),
        "norm.weight": 1 + draw(hidden_size),
        "lm_head.weight": draw(num_scored, hidden_size),
        "d2t": ids_C - torch.arange(num_scored),
        "t2d": is_scored_V,
    }
    config = {**_config(hidden_size, vocab_size), "draft_vocab_size": num_scored}
    return Head(tensors, config, "pytorch_model.bin")


def eagle31_head(*, vocab_size: int, num_scored: int, hidden_size: int = 64) -> Head:
    """EAGLE-3.1: each state is normed, and so is what is fed back."""
    head = eagle3_head(hidden_size=hidden_size, vocab_size=vocab_size, num_scored=num_scored)
    draw = _drawing(1)
    norms = {f"fc_norm.{i}.weight": 1 + draw(hidden_size) for i in range(3)}
    return head.adding(**norms).configured(norm_output=True, fc_norm=True)


def with_second_layer(head: Head) -> Head:
    hidden_size = head.config["hidden_size"]
    draw = _drawing(2)
    norm = {"layers.1.input_layernorm.weight": 1 + draw(hidden_size)}
    return head.adding(**_layer(hidden_size, hidden_size, "layers.1", draw), **norm)


def _under_model(head: Head) -> Head:
    """As SGLang and NeMo nest all but the LM head and the id maps."""
    beside = ("lm_head.weight", "d2t", "t2d")
    return head.renamed(lambda name: name if name in beside else f"model.{name}")


def _as_layer_0(head: Head) -> Head:
    return head.renamed(lambda name: name.replace("midlayer.", "layers.0."))


def _nested_config(head: Head, kind: str, **config: Any) -> Head:
    """As speculators nest the layer's settings."""
    own = ("draft_vocab_size", "norm_output", "fc_norm")
    outer = {name: value for name, value in head.config.items() if name in own}
    layer = {name: value for name, value in head.config.items() if name not in own}
    nested = {"speculators_model_type": kind, "transformer_layer_config": layer}
    return replace(head, config={**outer, **nested, **config})


def _frspec(head: Head) -> Head:
    """With a table of embeddings, which is the target's in published heads."""
    table_VM = torch.ones(head.config["vocab_size"], head.config["hidden_size"])
    return replace(head, file="model.safetensors").adding(**{"embed_tokens.weight": table_VM})


def _sglang_2(head: Head) -> Head:
    named = _under_model(replace(head, file="model.safetensors"))
    return named.configured(architectures=["LlamaForCausalLMEagle"])


def _vllm_2(head: Head) -> Head:
    named = replace(head, file="model.safetensors")
    return named.configured(architectures=["EagleLlamaForCausalLM"], model_type="eagle")


def _speculators_2(head: Head) -> Head:
    def rename(name: str) -> str:
        return name.replace("fc.", "fusion_fc.", 1).replace("layers.0.", "transformer.", 1)

    named = replace(head, file="model.safetensors").renamed(rename)
    return _nested_config(named, "eagle", architectures=["EagleSpeculator"], fusion_bias=True)


def _nvidia_3(head: Head) -> Head:
    """Layers that states leave, 1 before those that they enter."""
    aux = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
    named = _under_model(replace(head, file="model.safetensors")).without("t2d")
    return named.configured(eagle_config=aux)


def _vllm_3(head: Head) -> Head:
    def rename(name: str) -> str:
        return "draft_id_to_target_id" if name == "d2t" else name

    named = _as_layer_0(replace(head, file="model.safetensors")).renamed(rename).without("t2d")
    return named.configured(
        architectures=["Eagle3LlamaForCausalLM"], eagle_aux_hidden_state_layer_ids=[2, 4, 5]
    )


def _speculators_3(head: Head) -> Head:
    named = _as_layer_0(replace(head, file="model.safetensors"))
    layers = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5], "norm_before_residual": False}
    return _nested_config(named, "eagle3", architectures=["Eagle3Speculator"], **layers)


def _specforge_3(head: Head) -> Head:
    named = replace(head, file="model.safetensors")
    return named.configured(architectures=["LlamaForCausalLMEagle3"])


def _nemo_3(head: Head) -> Head:
    return _under_model(_as_layer_0(replace(head, file="model.safetensors")))


EAGLE2_LAYOUTS: Mapping[str, Callable[[Head], Head]] = {
    "eagle": lambda head: head,
    "frspec": _frspec,
    "sglang": _sglang_2,
    "vllm": _vllm_2,
    "speculators": _speculators_2,
}
EAGLE3_LAYOUTS: Mapping[str, Callable[[Head], Head]] = {
    "eagle": lambda head: head,
    "nvidia": _nvidia_3,
    "vllm": _vllm_3,
    "speculators": _speculators_3,
    "specforge": _specforge_3,
    "nemo": _nemo_3,
}
"""All read the states that enter layers 2, 4 and 5 of a target with 8, named or by default."""
