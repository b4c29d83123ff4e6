"""bf16 matrix products on CPUs that have no instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from apb.packed import has_fast_bf16

MIN_ROWS = 16
"""Below this many rows the conversion of the weights costs more than the product gains."""
CHUNK_ROWS = 1024


class WideLinears(TorchFunctionMode):
    """Within this context, 16-bit linear layers over many rows multiply in fp32.

    oneDNN's 16-bit product accumulates in fp32 as well, so the result is the same up to the order
    of summation. On an AVX2 machine (EPYC Milan, 2 cores, 2048 x 576 x 1536) it ran at 17 GFLOP/s
    and the fp32 product, conversions included, at 118.
    """

    @staticmethod
    def suit(device: torch.device) -> bool:
        """Whether they are faster there. A GPU that lacks bf16 has fp16."""
        return device.type == "cpu" and not has_fast_bf16(device)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            x, weight, *rest = args
            bias = rest[0] if rest else None
            if x.dtype in (torch.bfloat16, torch.float16) and x[..., 0].numel() >= MIN_ROWS:
                return _wide_linear(x, weight, bias)
        return func(*args, **(kwargs or {}))


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(x, weight, bias)`` by chunks of rows, so that the fp32 copies stay small."""
    weight_wide = weight.float()
    bias_wide = None if bias is None else bias.float()
    rows = x.flatten(0, -2)
    out = x.new_empty((rows.shape[0], weight.shape[0]))
    for rows_in, rows_out in zip(rows.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
        rows_out.copy_(torch.nn.functional.linear(rows_in.float(), weight_wide, bias_wide))
    unpacked: Tensor = out.unflatten(0, x.shape[:-1])
    return unpacked
