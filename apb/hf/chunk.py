"""Row-wise modules in chunks of rows, so that their intermediates do not grow with the document."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_ROW_WISE = ("mlp", "input_layernorm", "post_attention_layernorm")
"""What decoder layers call the modules that look at one row at a time."""


def run_in_chunks(model: Any, chunk_len: int) -> None:
    """Let MLPs and norms of a Hugging Face decoder run on at most `chunk_len` rows at once.

    An MLP's intermediates and a norm's fp32 copies are many times their input; the results are the
    same row by row.
    """
    for layer in model.base_model.layers:
        for name in _ROW_WISE:
            module = getattr(layer, name)
            module.forward = partial(_by_chunks, module.forward, chunk_len)
    norm = model.base_model.norm
    norm.forward = partial(_by_chunks, norm.forward, chunk_len)


def _by_chunks(forward: Callable[[Tensor], Tensor], chunk_len: int, x_BTM: Tensor) -> Tensor:
    num_rows = x_BTM.shape[1]
    if num_rows <= chunk_len:
        return forward(x_BTM)
    out_BTM = torch.empty_like(x_BTM)
    num_chunks = -(-num_rows // chunk_len)
    for rows, out in zip(x_BTM.chunk(num_chunks, 1), out_BTM.chunk(num_chunks, 1), strict=True):
        out.copy_(forward(rows))
    return out_BTM
