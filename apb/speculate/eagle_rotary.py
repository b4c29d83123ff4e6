"""The rotary embedding that a head's own configuration describes.

Letters: D head dim, F = D / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from apb.errors import InputError
from apb.rotary import Rotary

DEFAULT_THETA = 10_000.0
"""Where a configuration says nothing, as in most EAGLE-3 heads."""

_Settings = Mapping[str, Any]


def own_rotary(config: _Settings, head_dim: int) -> Rotary:
    """Angles as the configuration says, in the words of any version of transformers.

    Raises:
        InputError: a kind that apb does not know, or one whose settings are incomplete.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    settings = {"rope_theta": config.get("rope_theta", DEFAULT_THETA), **settings}
    limit = config.get("max_position_embeddings")
    settings.setdefault("original_max_position_embeddings", limit)
    kind = str(settings.get("rope_type", settings.get("type", "default")))
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if kind not in _KINDS or partial != 1.0:
        what = f"{kind!r} RoPE" if kind not in _KINDS else f"RoPE on {partial} of each head"
        raise InputError(
            f"this EAGLE head wants {what}, which apb does not run: set drafter.rope=target to "
            "use the model's"
        )
    powers_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq_F = 1.0 / float(settings["rope_theta"]) ** powers_F
    try:
        return _KINDS[kind](inv_freq_F, settings)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"this EAGLE head's {kind!r} RoPE is incomplete ({error}): set drafter.rope=target to "
            "use the model's"
        ) from error


def _default(inv_freq_F: Tensor, settings: _Settings) -> Rotary:
    return Rotary(inv_freq_F, 1.0)


def _linear(inv_freq_F: Tensor, settings: _Settings) -> Rotary:
    return Rotary(inv_freq_F / settings["factor"], 1.0)


def _llama3(inv_freq_F: Tensor, settings: _Settings) -> Rotary:
    """Slow angles are slowed down further, quick ones stay, and those between are blended."""
    factor, length = settings["factor"], settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns_F = length * inv_freq_F / (2 * math.pi)
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return Rotary(inv_freq_F * (kept_F + (1 - kept_F) / factor), 1.0)


def _yarn(inv_freq_F: Tensor, settings: _Settings) -> Rotary:
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071)."""
    factor, length = settings["factor"], settings["original_max_position_embeddings"]
    num_angles, theta = len(inv_freq_F), float(settings["rope_theta"])

    def angle_of(turns: float) -> float:
        """Which angle makes so many turns over the original length."""
        return num_angles * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    low = angle_of(settings.get("beta_fast") or 32)
    high = angle_of(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_angles - 1)
    ramp_F = (torch.arange(num_angles) - low) / max(high - low, 0.001)
    slowed_F = ramp_F.clamp(0, 1)
    return Rotary(inv_freq_F * (1 - slowed_F + slowed_F / factor), _yarn_scaling(settings))


def _yarn_scaling(settings: _Settings) -> float:
    """By which attention is made as sharp as it was before angles slowed down."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    growth = 0.1 * math.log(max(settings["factor"], 1))
    above, below = settings.get("mscale"), settings.get("mscale_all_dim")
    return float((growth * above + 1) / (growth * below + 1) if above and below else growth + 1)


_KINDS: Mapping[str, Callable[[Tensor, _Settings], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
