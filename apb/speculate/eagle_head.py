"""The networks of EAGLE heads, which predict tokens from states of the target: their parts, and
the heads of EAGLE-1/2.

Letters: T rows of a pass, M hidden size of the head, E width of the target's states that it reads,
W width of what attention reads, H query heads, K key/value heads, D head dim, F = D / 2.
Batch dimensions may stand before any T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb.rotary import Rotary, Rotation

ALL_ROWS = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Sizes of a head and which of its optional parts there are.

    Attributes:
        state_sizes: widths of the target's states that it reads side by side; one for EAGLE-1/2.
        num_layers: decoder layers; published heads have one.
        fc_bias, qkv_bias, o_bias, mlp_bias: whether these projections have a bias.
        qk_norm: queries and keys are normed per head (Qwen3).
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    state_sizes: tuple[int, ...]
    num_layers: int = 1
    norm_eps: float = 1e-6
    fc_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


class Attend(Protocol):
    """Which rows see which: a plain causal mask in training, a cache and a tree in drafting."""

    def __call__(self, layer_idx: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor) -> Tensor:
        """Attention of a layer's new rows, ``[H, T, D]``, or of those that queries are given for;
        queries and keys are rotated.
        """


class Pass(NamedTuple):
    """What all layers are told of one pass."""

    rotation: Rotation
    attend: Attend
    wanted: slice
    num_layers: int

    def rows(self, layer_idx: int) -> slice:
        """Which a layer has to tell; of the others it computes keys and values alone."""
        return self.wanted if layer_idx == self.num_layers - 1 else ALL_ROWS


class HeadOutput(NamedTuple):
    """What a head says of the token behind each of its rows."""

    for_logits_TM: Tensor
    """Input of the LM head."""
    states_TM: Tensor
    """Stand for the target's state of that token where it is not known."""


class Attention(nn.Module):
    """Self-attention with grouped key/value heads."""

    def __init__(self, shape: HeadShape, layer_idx: int, width: int) -> None:
        super().__init__()
        self._layer_idx, self._head_dim = layer_idx, shape.head_dim
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(width, q_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.o_bias)
        self.q_norm = rms_norm(shape, shape.head_dim) if shape.qk_norm else nn.Identity()
        self.k_norm = rms_norm(shape, shape.head_dim) if shape.qk_norm else nn.Identity()

    def forward(self, x_TW: Tensor, this: Pass) -> Tensor:
        rows = this.rows(self._layer_idx)
        q_HTD = this.rotation.of(rows).rotate(
            self.q_norm(self._split(self.q_proj(x_TW[..., rows, :])))
        )
        k_KTD = this.rotation.rotate(self.k_norm(self._split(self.k_proj(x_TW))))
        out_HTD = this.attend(self._layer_idx, q_HTD, k_KTD, self._split(self.v_proj(x_TW)))
        out_TM: Tensor = self.o_proj(out_HTD.transpose(-3, -2).flatten(-2))
        return out_TM

    def _split(self, x_TQ: Tensor) -> Tensor:
        x_HTD: Tensor = x_TQ.unflatten(-1, (-1, self._head_dim)).transpose(-3, -2)
        return x_HTD


class Mlp(nn.Module):
    """The gated feed-forward network of Llama."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x_TM: Tensor) -> Tensor:
        out_TM: Tensor = self.down_proj(F.silu(self.gate_proj(x_TM)) * self.up_proj(x_TM))
        return out_TM


class DecoderLayer(nn.Module):
    """A Llama-type layer whose attention may read something wider than the residual stream."""

    def __init__(self, shape: HeadShape, layer_idx: int, *, width: int) -> None:
        super().__init__()
        self._layer_idx = layer_idx
        self.self_attn = Attention(shape, layer_idx, width)
        self.mlp = Mlp(shape)
        self.post_attention_layernorm = rms_norm(shape)

    def run(self, x_TW: Tensor, residual_TM: Tensor, this: Pass) -> Tensor:
        x_TM = residual_TM[..., this.rows(self._layer_idx), :] + self.self_attn(x_TW, this)
        out_TM: Tensor = x_TM + self.mlp(self.post_attention_layernorm(x_TM))
        return out_TM


class PlainLayer(DecoderLayer):
    """One after the first."""

    def __init__(self, shape: HeadShape, layer_idx: int) -> None:
        super().__init__(shape, layer_idx, width=shape.hidden_size)
        self.input_layernorm = rms_norm(shape)

    def forward(self, x_TM: Tensor, this: Pass) -> Tensor:
        return self.run(self.input_layernorm(x_TM), x_TM, this)


class EagleHead(nn.Module, ABC):
    """Reads pairs of a token and the target's state of the token before it.

    Names of its parameters are those of the published EAGLE weights, `midlayer` being `layers.0`.
    """

    def __init__(self, shape: HeadShape, rotary: Rotary) -> None:
        super().__init__()
        self.shape = shape
        # No buffer, which a change of the head's dtype would round.
        self.rotary = rotary

    @abstractmethod
    def combined(self, states_TE: Tensor) -> Tensor:
        """The target's states ``[T, E]`` as `forward` takes them, ``[T, M]``."""

    @abstractmethod
    def forward(
        self,
        embeds_TM: Tensor,
        states_TM: Tensor,
        positions_T: Tensor,
        attend: Attend,
        wanted: slice = ALL_ROWS,
    ) -> HeadOutput:
        """One pass over new rows.

        Args:
            embeds_TM: input embeddings of the tokens.
            states_TM: of the tokens before them: the target's, `combined`, or where the target has
                not read them the head's own of an earlier pass.
            positions_T: of the tokens before them. Attention knows only distances, so any other
                origin would do.
            attend: caches and masks.
            wanted: rows whose output is returned.
        """

    def _pass(self, positions_T: Tensor, attend: Attend, wanted: slice, dtype: torch.dtype) -> Pass:
        return Pass(self.rotary.at(positions_T, dtype), attend, wanted, self.shape.num_layers)


class Eagle2Head(EagleHead):
    """EAGLE-1 and EAGLE-2 (Li et al. 2024, https://arxiv.org/abs/2401.15077 and
    https://arxiv.org/abs/2406.16858): the network extrapolates the target's states after its final
    norm, so that what it returns goes to the LM head and back to its own input as it is.
    """

    def __init__(self, shape: HeadShape, rotary: Rotary) -> None:
        super().__init__(shape, rotary)
        hidden = shape.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=shape.fc_bias)
        first = DecoderLayer(shape, 0, width=hidden)
        later = (PlainLayer(shape, layer_idx) for layer_idx in range(1, shape.num_layers))
        self.layers = nn.ModuleList([first, *later])

    def combined(self, states_TE: Tensor) -> Tensor:
        return states_TE

    def forward(
        self,
        embeds_TM: Tensor,
        states_TM: Tensor,
        positions_T: Tensor,
        attend: Attend,
        wanted: slice = ALL_ROWS,
    ) -> HeadOutput:
        x_TM = self.fc(torch.cat((embeds_TM, states_TM), dim=-1))
        this = self._pass(positions_T, attend, wanted, x_TM.dtype)
        first, *later = self.layers
        assert isinstance(first, DecoderLayer)
        x_TM = first.run(x_TM, x_TM, this)  # without a norm before attention
        for layer in later:
            x_TM = layer(x_TM, this)
        return HeadOutput(x_TM, x_TM)


class _RmsNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))  # which is another one under autocast


def rms_norm(shape: HeadShape, size: int | None = None) -> nn.RMSNorm:
    return _RmsNorm(shape.hidden_size if size is None else size, eps=shape.norm_eps)
