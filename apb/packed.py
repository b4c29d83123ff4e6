"""Linear layers over few rows on the CPU: weights in the order in which oneDNN reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ROWS = 64
"""Beyond this many rows the plain product costs no more."""
_PACKED_FOR = 8
"""Rows that oneDNN has in mind when it chooses an order."""
_SHARE_OF_MEMORY = 0.25
"""What packed copies of the weights may take of the memory that is available."""


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices at least as fast as fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    get = getattr(torch.cpu, "get_capabilities", None)  # older torch does not tell: assume not
    capabilities = {} if get is None else get()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_tile", "bf16"))


class PackedLinear:
    """A linear layer's product with few rows.

    Plain products with 2 to 32 rows take up to three times as long as with one row, because the
    weights are reordered each time; with packed ones up to 12 rows take hardly longer than one,
    which is what makes verifying drafts worth it (SmolLM2-135M's layers in fp32 on 2 cores of an
    EPYC Milan: 75 ms for 2 rows and 64 for 12, packed 27 and 37).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # What torch's own compiler does with the weights of a frozen model.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return product


def can_pack(weights: Sequence[Tensor]) -> bool:
    """Whether the CPU multiplies packed weights of their dtype, and memory holds the copies."""
    cpu = torch.device("cpu")
    dtypes = {weight.dtype for weight in weights if weight.device == cpu}
    fast = dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and has_fast_bf16(cpu))
    has_operators = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if not fast or not has_operators or not torch.backends.mkldnn.is_available():
        return False
    num_bytes = sum(weight.nbytes for weight in weights)
    return num_bytes <= _SHARE_OF_MEMORY * _available_bytes()


def pack_linears(model: nn.Module) -> bool:
    """Let a small model's linear layers multiply few rows by packed copies of their weights.

    A layer is packed when it first meets few rows. Returns whether it is done; see `can_pack`.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not can_pack([layer.weight for layer in layers]):
        return False
    for layer in layers:
        plain = layer.forward
        layer.forward = _FewRows(plain, layer.weight, layer.bias)  # type: ignore[assignment]
    return True


def product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The linear map of a weight, packed for few rows where `can_pack` says so."""
    plain = partial(F.linear, weight=weight, bias=bias)
    return _FewRows(plain, weight, bias) if can_pack([weight]) else plain


def _available_bytes() -> int:
    """Memory that may be taken without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


class _FewRows:
    """A linear map that packs its weight when it first meets few rows."""

    def __init__(
        self, plain: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None
    ) -> None:
        self._plain, self._weight, self._bias = plain, weight, bias
        self._packed: PackedLinear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > MAX_ROWS * x.shape[-1]:
            return self._plain(x)
        if self._packed is None:
            self._packed = PackedLinear(self._weight, self._bias)
        return self._packed(x)
