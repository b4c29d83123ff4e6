"""The `flash-attn` package: FlashAttention-3 where it is installed on Hopper, else 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from apb.attention.base import (
    AttentionBackend,
    AttentionPartial,
    AttentionTarget,
    BackendConfig,
    check_flash_target,
)
from apb.errors import InputError


class FlashBackend(AttentionBackend):
    """One call per segment, merged by log-sum-exp.

    Args:
        forward: the package's `flash_attn_func`, which returns output and log-sum-exp first.
    """

    name: ClassVar[str] = "flash"

    def __init__(self, forward: Callable[..., tuple[Any, ...]]) -> None:
        self._forward = forward

    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        q_1THD, k_1SKD, v_1SKD = (x.transpose(0, 1)[None] for x in (q_HTD, k_KSD, v_KSD))
        out_1THD, lse_1HT, *_ = self._forward(
            q_1THD, k_1SKD, v_1SKD, softmax_scale=scale, causal=causal
        )
        return AttentionPartial(out_1THD[0], lse_1HT[0].mT)


@dataclass(kw_only=True, slots=True)
class FlashConfig(BackendConfig):
    """Config of `FlashBackend`."""

    def build(self, target: AttentionTarget) -> FlashBackend:
        if target.device.type != "cuda":
            raise InputError("backend=flash needs a GPU; on a CPU use backend=sdpa")
        if target.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(
                f"backend=flash does not support {target.dtype}; use dtype=bfloat16 or backend=sdpa"
            )
        check_flash_target("flash", target)
        return FlashBackend(_flash_attn_func(target.device))


def _flash_attn_func(device: torch.device) -> Callable[..., tuple[Any, ...]]:
    """FlashAttention-3 is a module of its own and runs on Hopper alone."""
    if find_spec("flash_attn_interface") and torch.cuda.get_device_capability(device)[0] == 9:
        from flash_attn_interface import flash_attn_func as flash_attn_3_func

        return returning_lse(flash_attn_3_func)
    if not find_spec("flash_attn"):
        raise InputError(
            "backend=flash needs the package flash-attn, which is not installed: "
            "pip install flash-attn --no-build-isolation, or use backend=sdpa"
        )
    from flash_attn import flash_attn_func

    return returning_lse(flash_attn_func)


def returning_lse(forward: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """FlashAttention-3 returned the log-sum-exp unasked until it could be asked for it."""
    if "return_attn_probs" in signature(forward).parameters:
        return partial(forward, return_attn_probs=True)
    return forward
