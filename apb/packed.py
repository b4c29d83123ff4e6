"""Linear layers over few rows on the CPU: weights in the order in which oneDNN reads them."""

from __future__ import annotations

from pathlib import Path

import torch
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


def pack_linears(model: nn.Module) -> bool:
    """Let the model's linear layers multiply few rows by packed copies of their weights.

    Plain products of 2 to 32 rows take up to three times as long as one row does, because the
    weights are reordered each time; with packed ones up to 12 rows take no longer than one, which
    is what makes verifying drafts worth it (SmolLM2-135M's layers in fp32 on 2 cores of an EPYC
    Milan: 75 ms for 2 rows and 64 for 12, packed 27 and 37). Packing is left to each layer's first
    use with few rows, so that a rank that never decodes has no copies.

    Returns whether it is done: where the CPU multiplies the dtype and memory allows.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    weight_bytes = sum(layer.weight.nbytes for layer in layers)
    if not _is_supported(layers) or weight_bytes > _SHARE_OF_MEMORY * _available_bytes():
        return False
    for layer in layers:
        layer.forward = _PackedLinear(layer)  # type: ignore[assignment]
    return True


def _is_supported(layers: list[nn.Linear]) -> bool:
    cpu = torch.device("cpu")
    dtypes = {layer.weight.dtype for layer in layers if layer.weight.device == cpu}
    fast = dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and has_fast_bf16(cpu))
    has_operators = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return fast and has_operators and torch.backends.mkldnn.is_available()


def _available_bytes() -> int:
    """Memory that may be taken without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


class _PackedLinear:
    """A linear layer's `forward`."""

    def __init__(self, layer: nn.Linear) -> None:
        self._plain, self._weight, self._bias = layer.forward, layer.weight, layer.bias
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > MAX_ROWS * x.shape[-1]:
            return self._plain(x)
        if self._packed is None:
            # What torch's own compiler does with the weights of a frozen model.
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, _PACKED_FOR)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return product
