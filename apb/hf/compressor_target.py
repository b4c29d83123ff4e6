"""A Hugging Face model as compressors see it, from its configuration alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apb.compress.base import CompressorTarget
from apb.hf.shape import model_shape
from apb.model_config import ModelConfig
from apb.rotary import Rotary


def compressor_target(
    config: ModelConfig, hf_config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype
) -> CompressorTarget:
    """What a compressor may know of a model before its weights are loaded."""
    inv_freq_F, scaling = rotary_of(hf_config)
    return CompressorTarget(
        model=config.name,
        shape=model_shape(hf_config),
        hidden_act=hf_config.hidden_act,
        rotary=Rotary(inv_freq_F.to(device), scaling),
        device=device,
        dtype=dtype,
        shipped=config.shipped_folder,
    )


def rotary_of(hf_config: PreTrainedConfig) -> Rotary:
    """The rotary embedding that transformers gives a model of this configuration, on the CPU."""
    settings = hf_config.rope_parameters
    kind = settings["rope_type"]
    if kind != "default":
        inv_freq_F, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        return Rotary(inv_freq_F, float(scaling))
    head_dim = model_shape(hf_config).head_dim
    powers_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return Rotary(1.0 / settings["rope_theta"] ** powers_F, 1.0)
