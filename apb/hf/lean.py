"""The same decoder with less around it, for passes over few rows on the CPU.

Letters: T rows, M hidden size, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb.attention.base import LayerInputs
from apb.hf.tap import PassTap
from apb.methods.base import Attend
from apb.packed import PackedLinear, can_pack


class LeanDecoder:
    """Runs a Hugging Face decoder's own weights without its modules.

    With few rows the modules take a third of a pass on a CPU, and more with each row. Here a layer
    is four products by packed weights (query, key and value are one, gate and up another) and a
    dozen small operations. The results are those of the modules up to rounding.
    """

    def __init__(self, model: Any) -> None:
        base = model.base_model
        self._embedding, self._rotary, self._norm = base.embed_tokens, base.rotary_emb, base.norm
        self._head = PackedLinear(model.get_output_embeddings().weight, None)
        self._layers = [_Layer.of(layer) for layer in base.layers]

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether the model is made as Llama is, its weights can be packed and memory allows."""
        head = model.get_output_embeddings()
        weights = [x.weight for x in model.modules() if isinstance(x, nn.Linear)]
        is_plain = head.bias is None and all(map(_is_plain, model.base_model.layers))
        return is_plain and can_pack(weights)

    def forward(
        self, token_ids: Sequence[int], positions_T: Tensor, attend: Attend, taps: Iterable[PassTap]
    ) -> Tensor:
        """Final hidden states ``[T, M]``."""
        x_TM = F.embedding(torch.tensor(token_ids), self._embedding.weight)
        cos_1TD, sin_1TD = self._rotary(x_TM[None], positions_T[None])
        cos_T1D, sin_T1D = cos_1TD[0, :, None], sin_1TD[0, :, None]
        taps = list(taps)
        for tap in taps:
            tap.begin(positions_T)
        for layer in self._layers:
            for tap in taps:
                tap.entering(layer.index, x_TM)
            x_TM = layer(x_TM, cos_T1D, sin_T1D, attend)
        x_TM = _normed(x_TM, self._norm.weight, self._norm.variance_epsilon)
        for tap in taps:
            tap.final(x_TM)
        return x_TM

    def logits(self, hidden_TM: Tensor) -> Tensor:
        """Logits ``[T, V]`` in fp32."""
        return self._head(hidden_TM).float()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Layer:
    """One layer's weights."""

    index: int
    num_heads: int
    num_kv_heads: int
    scale: float
    eps: float
    before_attention_M: Tensor
    before_mlp_M: Tensor
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        return cls(
            index=attention.layer_idx,
            num_heads=attention.q_proj.out_features // head_dim,
            num_kv_heads=attention.k_proj.out_features // head_dim,
            scale=attention.scaling,
            eps=layer.input_layernorm.variance_epsilon,
            before_attention_M=layer.input_layernorm.weight,
            before_mlp_M=layer.post_attention_layernorm.weight,
            q_norm_D=_weight(attention, "q_norm"),
            k_norm_D=_weight(attention, "k_norm"),
            qkv=_together(attention.q_proj, attention.k_proj, attention.v_proj),
            out=_together(attention.o_proj),
            gate_up=_together(mlp.gate_proj, mlp.up_proj),
            down=_together(mlp.down_proj),
        )

    def __call__(self, x_TM: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, attend: Attend) -> Tensor:
        rotated = self.num_heads + self.num_kv_heads
        head_dim = cos_T1D.shape[-1]
        normed_TM = _normed(x_TM, self.before_attention_M, self.eps)
        qkv_TXD = self.qkv(normed_TM).unflatten(-1, (-1, head_dim))
        qk_TXD, v_TKD = qkv_TXD[:, :rotated], qkv_TXD[:, rotated:]
        if self.q_norm_D is not None and self.k_norm_D is not None:
            q_THD = _normed(qk_TXD[:, : self.num_heads], self.q_norm_D, self.eps)
            k_TKD = _normed(qk_TXD[:, self.num_heads :], self.k_norm_D, self.eps)
            qk_TXD = torch.cat((q_THD, k_TKD), dim=1)
        low_TXF, high_TXF = qk_TXD.chunk(2, dim=-1)
        turned_TXD = torch.cat((-high_TXF, low_TXF), dim=-1)
        qk_XTD = (qk_TXD * cos_T1D).addcmul_(turned_TXD, sin_T1D).transpose(0, 1)
        q_HTD, k_KTD = qk_XTD[: self.num_heads], qk_XTD[self.num_heads :]
        layer = LayerInputs(self.index, q_HTD, k_KTD, v_TKD.transpose(0, 1), self.scale)
        x_TM = x_TM + self.out(attend(layer).to(x_TM.dtype).flatten(1))
        gate, up = self.gate_up(_normed(x_TM, self.before_mlp_M, self.eps)).chunk(2, dim=-1)
        return x_TM + self.down(F.silu(gate).mul_(up))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _together(*layers: nn.Linear) -> PackedLinear:
    """Layers with the same input as one."""
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    weights: list[Tensor] = [layer.weight for layer in layers]
    return PackedLinear(torch.cat(weights), torch.cat(biases) if biases else None)


def _weight(module: Any, name: str) -> Tensor | None:
    norm = getattr(module, name, None)
    return None if norm is None else norm.weight


def _is_plain(layer: Any) -> bool:
    """Whether a layer has the parts that are run here, and no others."""
    attention, mlp = layer.self_attn, layer.mlp
    parts = {name for name, _ in layer.named_children()}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    inner = {name for name, _ in attention.named_children()}
    biases = {getattr(attention, name).bias is None for name in ("q_proj", "k_proj", "v_proj")}
    return (
        parts == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        and inner in (projections, projections | {"q_norm", "k_norm"})
        and {name for name, _ in mlp.named_children()}
        == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and "silu" in type(mlp.act_fn).__name__.lower()
        and len(biases) == 1
        and (mlp.gate_proj.bias is None) == (mlp.up_proj.bias is None)
    )
