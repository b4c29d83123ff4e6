"""flash-attn on a CPU: what `apb` calls, and what the package `ring_flash_attn` imports.

The stand-in is a plain function with the signature of flash-attn 2.7 and later, so the package
takes its branches for ``window_size_left`` and ``window_size_right`` and for four results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn
from unittest.mock import patch

import torch
from torch import Tensor

_PACKAGES = ("flash_attn", "ring_flash_attn")


@contextmanager
def flash_attn_stand_in() -> Iterator[None]:
    """Within it, `ring_flash_attn` is imported over the stand-in; afterwards all is as it was.

    The package's adapters for Hugging Face are left out: those of version 0.1.8 import a name that
    transformers 5 does not have. Its helpers stay uncompiled: TorchScript rejects `poisoned_empty`.
    """
    interface = {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _absent}
    varlen = {"_flash_attn_varlen_forward": _absent, "_flash_attn_varlen_backward": _absent}
    adapters = {"substitute_hf_flash_attn": _absent, "update_ring_flash_attn_params": _absent}
    found = _forget()
    for name, members in (
        ("flash_attn", {}),
        ("flash_attn.flash_attn_interface", interface | varlen),
        ("ring_flash_attn.adapters", adapters),
    ):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        with patch.object(torch.jit, "script", lambda helper: helper):
            yield
    finally:
        _forget()
        sys.modules.update(found)


def _forget() -> dict[str, ModuleType]:
    """Take both packages out of the imported modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """Attention ``[B, T, H, D]`` in fp32 and its log-sum-exps ``[B, H, T]``.

    If causal, the last query sees every key and each query before it one key less.
    """
    assert (dropout_p, window_size_left, window_size_right, softcap) == (0, -1, -1, 0)
    assert alibi_slopes is None
    assert not return_softmax
    q_BKGTD = q.float().transpose(1, 2).unflatten(1, (k.shape[2], -1))
    k_BKSD, v_BKSD = k.float().transpose(1, 2), v.float().transpose(1, 2)
    score_BKGTS = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD, k_BKSD) * softmax_scale
    if causal:
        hidden_TS = torch.ones(score_BKGTS.shape[-2:], dtype=torch.bool)
        hidden_TS = hidden_TS.triu(k.shape[1] - q.shape[1] + 1)
        score_BKGTS = score_BKGTS.masked_fill(hidden_TS, float("-inf"))
    lse_BKGT = score_BKGTS.logsumexp(dim=-1)
    weight_BKGTS = (score_BKGTS - lse_BKGT[..., None]).exp()
    out_BKGTD = torch.einsum("bkgts,bksd->bkgtd", weight_BKGTS, v_BKSD)
    out = out_BKGTD.flatten(1, 2).transpose(1, 2).to(q.dtype)
    return out, lse_BKGT.flatten(1, 2), None, None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:
    """The public function of flash-attn 2, as far as `apb` calls it."""
    assert return_attn_probs
    out, lse, *_ = _flash_attn_forward(
        q, k, v, 0.0, softmax_scale, causal, -1, -1, 0.0, None, False
    )
    return out, lse, None


def _absent(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("no part of the stand-in for flash_attn")
