"""The backend for a device, dtype and head size, by what was measured there."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from apb.attention.base import AttentionBackend, AttentionTarget, BackendConfig
from apb.attention.fused import FusedConfig
from apb.attention.sdpa import SdpaConfig


@dataclass(kw_only=True, slots=True)
class AutoBackendConfig(BackendConfig):
    """Takes `fused` on GPUs for which its kernels were tuned and `sdpa` everywhere else.

    A request's metrics name the backend that ran.
    """

    def build(self, target: AttentionTarget) -> AttentionBackend:
        config = FusedConfig() if _is_tuned(target) else SdpaConfig()
        return config.build(target)


def _is_tuned(target: AttentionTarget) -> bool:
    if target.device.type != "cuda" or find_spec("triton") is None:
        return False
    from apb_kernels.tiles import table_key, tuned_table

    tuned = tuned_table().get(torch.cuda.get_device_name(target.device), {})
    keys = (table_key(kernel, target.dtype, target.head_dim) for kernel in ("segment", "decode"))
    return all(key in tuned for key in keys)
