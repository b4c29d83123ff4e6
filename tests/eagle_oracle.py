"""EAGLE heads stated with the Hugging Face decoder layer: whole sequences, no cache, fp64.

Letters: T rows, M hidden size, E width of the target's states, C tokens that the head scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from eagle_checkpoints import HEAD_DIM, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, Head


class Rows(NamedTuple):
    """What is fed back, and what goes to the LM head."""

    states_TM: Tensor
    normed_TM: Tensor


class Oracle:
    """A head of either family, of the tensors as the EAGLE repository names them."""

    def __init__(
        self, head: Head, rope_theta: float, *, norm_before_residual: bool = False
    ) -> None:
        self._tensors = {
            name.replace("midlayer.", "layers.0."): tensor.double()
            for name, tensor in head.tensors.items()
        }
        self._is_eagle3 = "norm.weight" in self._tensors
        self._norm_before_residual = norm_before_residual
        hidden_size = self._tensors["fc.weight"].shape[0]
        self._config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            rms_norm_eps=head.config["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        )
        self._config._attn_implementation = "sdpa"  # the eager one rounds to fp32
        self._rotary = LlamaRotaryEmbedding(self._config)
        count = len({name.split(".")[1] for name in self._tensors if name.startswith("layers.")})
        self._first, *self._later = [self._built_layer(index) for index in range(count)]

    def _built_layer(self, index: int) -> LlamaDecoderLayer:
        hidden_size = self._config.hidden_size
        layer = LlamaDecoderLayer(self._config, index)
        # The Hugging Face norm rounds to fp32.
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer.add_module(name, nn.RMSNorm(hidden_size, eps=self._config.rms_norm_eps))
        if index == 0:
            layer.add_module("input_layernorm", nn.Identity())  # what there is stands below
            for name in ("q_proj", "k_proj", "v_proj"):
                size = getattr(layer.self_attn, name).out_features
                width = hidden_size * (2 if self._is_eagle3 else 1)
                setattr(layer.self_attn, name, nn.Linear(width, size, bias=False))
        wanted = layer.state_dict()
        weights = {name: self._tensors[f"layers.{index}.{name}"] for name in wanted}
        layer.double().load_state_dict(weights)
        return layer

    def _norm(self, name: str, x_TM: Tensor) -> Tensor:
        mean_square_T1 = x_TM.pow(2).mean(dim=-1, keepdim=True)
        normed_TM: Tensor = x_TM / (mean_square_T1 + self._config.rms_norm_eps).sqrt()
        return self._tensors[name] * normed_TM

    @torch.no_grad()
    def combined(self, states_TE: Tensor) -> Tensor:
        """The target's states as the head takes them."""
        if not self._is_eagle3:
            return states_TE
        hidden_size = self._config.hidden_size
        if "fc_norm.0.weight" in self._tensors:
            parts = states_TE.split(hidden_size, dim=-1)
            normed = [self._norm(f"fc_norm.{i}.weight", part) for i, part in enumerate(parts)]
            states_TE = torch.cat(normed, dim=-1)
        if "input_norm.weight" in self._tensors:
            states_TE = self._norm("input_norm.weight", states_TE)
        return states_TE @ self._tensors["fc.weight"].T

    @torch.no_grad()
    def __call__(
        self, embeds_TM: Tensor, states_TM: Tensor, positions: list[int], visible_TT: Tensor
    ) -> Rows:
        positions_1T = torch.tensor([positions])
        rotation = self._rotary(embeds_TM[None], positions_1T)
        mask = visible_TT[None, None]
        read, mix = self._first, {"position_embeddings": rotation, "attention_mask": mask}
        if self._is_eagle3:
            embeds_TM = self._norm("layers.0.input_layernorm.weight", embeds_TM)
            normed_TM = self._norm("layers.0.hidden_norm.weight", states_TM)
            both = torch.cat((embeds_TM, normed_TM), dim=-1)
            x_TM = normed_TM if self._norm_before_residual else states_TM
            x_TM = x_TM + read.self_attn(both[None], **mix)[0][0]
            x_TM = x_TM + read.mlp(read.post_attention_layernorm(x_TM))
        else:
            both = torch.cat((embeds_TM, states_TM), dim=-1)
            x_TM = both @ self._tensors["fc.weight"].T + self._tensors["fc.bias"]
            x_TM = read(x_TM[None], **mix)[0]
        for layer in self._later:
            x_TM = layer(x_TM[None], **mix)[0]
        return Rows(x_TM, self._norm("norm.weight", x_TM) if self._is_eagle3 else x_TM)
