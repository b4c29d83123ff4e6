"""Retaining heads: a small trained network scores every token (APB, section 3.4; Locret).

Letters: S tokens of the block, T of them at once, R hidden size of a head, I its inputs, P kept
tokens, K key/value heads, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.attention.base import AttentionBackend
from apb.compress.base import BlockView, Compressor, CompressorConfig, CompressorTarget
from apb.compress.retaining_file import FILE_NAME, RetainingHead, RetainingHeads
from apb.errors import InputError
from apb.rotary import Rotary

_log = logging.getLogger(__name__)
_NAME = "retaining_head"
_ROWS = 2048
"""Scored at once: an MLP's worth of intermediates, however long the block."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""Hugging Face's names."""


class RetainingHeadCompressor(Compressor):
    """Keeps the tokens to which a trained head gives the highest scores.

    APB (Huang et al. 2025, https://arxiv.org/abs/2502.12085, section 3.4) with the heads of Locret
    (https://arxiv.org/abs/2410.01805): per layer ``act([q; k; v] fc1) fc2``, where q, k and v are
    what RoPE gets, one score per key/value head. A model that norms q and k (Qwen3) has them normed
    there; nobody has published heads for one. Scores are max-pooled, as in APB's code.
    """

    def __init__(self, *, heads: str | None, kernel: int) -> None:
        self._path, self.pool = heads, kernel
        self._layers: list[RetainingHead] = []

    def attach(self, target: CompressorTarget) -> None:
        """Reads the heads."""
        target.require_whole_rotary(_NAME)
        self.use(RetainingHeads.read(self._found(target), target.shape), target)

    def use(self, heads: RetainingHeads, target: CompressorTarget) -> None:
        """Score with these heads from now on."""
        self._rotary = target.rotary
        if heads.model not in (None, target.model):
            _log.info("the retaining heads were made for %s, this is %s", heads.model, target.model)
        self._act = activation(heads.activation or target.hidden_act)
        self._layers = [
            RetainingHead(fc1_RI.to(target.device, target.dtype), fc2_KR.to(target.device).float())
            for fc1_RI, fc2_KR in heads.layers
        ]

    def _found(self, target: CompressorTarget) -> str:
        if self._path is not None:
            return self._path
        shipped = None if target.shipped is None else target.shipped / FILE_NAME
        if shipped is None or not shipped.is_file():
            raise InputError(
                f"apb ships no retaining heads for {target.model}: set method.compressor.heads to "
                "a file or folder of them, or train some with `python -m apb.train retaining_heads`"
            )
        return str(shipped)

    def score(self, block: BlockView) -> Tensor:
        num_kv_heads, num_tokens, _ = block.k_KSD.shape
        fc1_RI, fc2_KR = self._layers[block.layer_idx]
        scores_KS = block.k_KSD.new_empty(num_kv_heads, num_tokens, dtype=torch.float32)
        for start in range(0, num_tokens, _ROWS):
            rows = slice(start, min(start + _ROWS, num_tokens))
            x_TI = head_inputs(block, self._rotary, rows)
            hidden_TR = self._act(F.linear(x_TI.to(fc1_RI.dtype), fc1_RI))
            # In fp32: 16-bit scores of thousands of tokens would often be equal.
            scores_KS[:, rows] = fc2_KR @ hidden_TR.float().mT
        return scores_KS

    def select(
        self,
        block: BlockView,
        out_P2KD: Tensor,
        *,
        backend: AttentionBackend,
        excluded: int = 0,
    ) -> Tensor:
        """As everywhere; barred tokens are scored only as far as others are pooled with them."""
        skipped = max(0, excluded - self.pool // 2)
        kept_KP = super().select(
            block.from_row(skipped), out_P2KD, backend=backend, excluded=excluded - skipped
        )
        return kept_KP + skipped


def head_inputs(block: BlockView, rotary: Rotary, rows: slice) -> Tensor:
    """What a head reads of some rows, ``[q; k; v]`` before RoPE, in fp32: ``[T, I]``."""
    q_HTD, k_KTD = block.before_rope(rotary, rows)
    parts = (q_HTD, k_KTD, block.v_KSD[:, rows].float())
    return torch.cat([x_HTD.transpose(0, 1).flatten(1) for x_HTD in parts], dim=-1)


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Raises InputError for one that is not known."""
    if name not in ACTIVATIONS:
        raise InputError(
            f"retaining heads with activation {name!r} are not supported: apb knows "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


@dataclass(kw_only=True, slots=True)
class RetainingHeadConfig(CompressorConfig):
    """Config of `RetainingHeadCompressor`.

    Attributes:
        heads: a file or folder of them; None is what apb ships for the model.
        kernel: width of the pooling (odd).
    """

    heads: str | None = None
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"method.compressor.kernel={self.kernel} must be odd and positive")

    def build(self, *, seed: int) -> RetainingHeadCompressor:
        return RetainingHeadCompressor(heads=self.heads, kernel=self.kernel)
