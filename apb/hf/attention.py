"""The seam to Hugging Face models: their attention layers call what the forward pass carries."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from apb.attention.base import LayerInputs
from apb.methods.base import Attend

IMPLEMENTATION = "apb"
"""The name under which models find this attention (`attn_implementation`)."""


def register() -> None:
    """Make ``attn_implementation="apb"`` known to transformers; repeating it does no harm.

    No mask function is registered under the name, so models build no mask at all: visibility lives
    in the segments.
    """
    AttentionInterface.register(IMPLEMENTATION, _attention)


def _attention(
    module: nn.Module,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    apb_attend: Attend,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: after RoPE, heads first; returns ``[B, T, H, D]``."""
    assert attention_mask is None, "apb computes its own visibility; an attention mask reached it"
    assert q_BHTD.shape[0] == 1, "apb runs one document at a time"
    layer_idx = module.layer_idx
    assert isinstance(layer_idx, int)
    layer = LayerInputs(layer_idx, q_BHTD[0], k_BKTD[0], v_BKTD[0], scaling)
    out_THD = apb_attend(layer)
    return out_THD.to(q_BHTD.dtype)[None], None
