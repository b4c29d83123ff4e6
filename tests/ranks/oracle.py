"""The statement of APB that the runtime is held against: one process, dense masks, no optimisation.

One Hugging Face forward pass over the rows ``[anchor | context | query]``. In each layer the
passing tokens are chosen from the block's own queries and keys, and a boolean mask per KV head says
which rows see which keys; then a plain softmax. No code of `apb/methods` or `apb/compress` is used
but the latter's record of a block.

Letters: N rows of the pass, D head dim, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from apb.compress.base import BlockView
from apb.hf.model import load_config
from apb.rotary import Rotary
from models import hf_model, model_config
from score_statements import (
    expected_attention_scores,
    fused,
    keydiff_scores,
    lag_scores,
    tova_scores,
)

IMPLEMENTATION = "apb_oracle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One prompt and the rules to read it by (design, section 4)."""

    model: str
    context: tuple[int, ...]
    prefix_len: int
    query: tuple[int, ...]
    """Spliced into the anchor."""
    block_lens: tuple[int, ...]
    anchor_len: int
    passing_len: int
    layer_passing_lens: tuple[tuple[int, ...], ...] = ()
    """Instead of `passing_len`, per layer and block, as the plan spreads it."""
    shared: bool = True
    compressor: str = "query"
    window: int = 64
    kernel: int = 5
    details: tuple[tuple[str, Any], ...] = ()
    """Settings of a compressor that observes no rows."""
    new_ids: tuple[int, ...] = ()
    """Read after the context."""
    star: bool = False

    @property
    def has_anchor(self) -> bool:
        return len(self.block_lens) > 1

    @property
    def even_lens(self) -> tuple[int, ...]:
        """The lengths of as many even blocks, from which anchor and passing lengths follow."""
        count, length = len(self.block_lens), len(self.context)
        edges = [index * length // count for index in range(count + 1)]
        return tuple(stop - start for start, stop in pairwise(edges))

    @property
    def spliced(self) -> tuple[int, ...]:
        """The end of the query that fits into half of the anchor."""
        if self.star or not self.has_anchor:
            return ()
        room = min(len(self.query), self.anchor_len // 2)
        return self.query[len(self.query) - room :]

    @property
    def shown_len(self) -> int:
        """Context tokens in the anchor."""
        if not self.has_anchor:
            return 0
        if self.star:
            return self.even_lens[0]
        return min(self.anchor_len - len(self.spliced), self.even_lens[0])

    @property
    def splice(self) -> int:
        return min(self.prefix_len, self.shown_len)

    @property
    def anchor(self) -> tuple[int, ...]:
        rest = self.context[self.splice : self.shown_len]
        return (*self.context[: self.splice], *self.spliced, *rest)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Logits ``[T, V]`` of the new tokens."""
        rows = (*self.anchor, *self.context, *self.new_ids)
        positions = [
            *range(len(self.anchor)),
            *range(len(self.context) + len(self.new_ids)),
        ]
        model = _model(self.model)
        logits: Tensor = model(
            input_ids=torch.tensor([rows]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            statement=self,
        ).logits[0]
        return logits[len(self.anchor) + len(self.context) :]


@cache
def _model(name: str) -> PreTrainedModel:
    AttentionInterface.register(IMPLEMENTATION, _attention)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        load_config(model_config(name)), dtype=torch.float32, attn_implementation=IMPLEMENTATION
    )
    model.load_state_dict(hf_model(name).state_dict())
    model.eval().requires_grad_(False)
    return model


def _attention(
    module: nn.Module,
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKND: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    statement: Statement,
    **_: Any,
) -> tuple[Tensor, None]:
    assert attention_mask is None
    q_HND, k_KND, v_KND = q_BHND[0], k_BKND[0], v_BKND[0]
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    groups = q_HND.shape[0] // k_KND.shape[0]
    outputs = []
    for kv_head, (k_ND, v_ND) in enumerate(zip(k_KND, v_KND, strict=True)):
        q_GND = q_HND[kv_head * groups : (kv_head + 1) * groups]
        visible_NN = _visible(statement, _Layer(q_HND, k_KND, v_KND, scaling, layer_idx), kv_head)
        for q_ND in q_GND:
            scores_NN = (q_ND @ k_ND.T * scaling).masked_fill(~visible_NN, float("-inf"))
            outputs.append(scores_NN.softmax(dim=-1) @ v_ND)
    return torch.stack(outputs, dim=1)[None], None


class _Layer(NamedTuple):
    q_HND: Tensor
    k_KND: Tensor
    v_KND: Tensor
    scale: float
    layer_idx: int

    def block(self, statement: Statement, block_idx: int) -> BlockView:
        """A block's own rows."""
        start = sum(statement.block_lens[:block_idx])
        rows = slice(len(statement.anchor) + start, None)
        q, k, v = (x[:, rows][:, : statement.block_lens[block_idx]] for x in self[:3])
        return BlockView(0, block_idx, start, q, k, v, self.scale)


def _visible(statement: Statement, layer: _Layer, kv_head: int) -> Tensor:
    """Which rows see which keys for one KV head: bool ``[N, N]``."""
    num_rows, anchor_len = layer.k_KND.shape[1], len(statement.anchor)
    context_stop = anchor_len + len(statement.context)
    visible_NN = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    _see_causally(visible_NN, 0, anchor_len)
    upstream = list(range(anchor_len))
    start = anchor_len
    for block_idx, length in enumerate(statement.block_lens):
        rows = slice(start, start + length)
        if block_idx > 0:
            visible_NN[rows, upstream] = True
        _see_causally(visible_NN, start, start + length)
        if block_idx < len(statement.block_lens) - 1:
            kept = _select(statement, block_idx, layer, kv_head)
            upstream += [start + token for token in kept]
        start += length
    visible_NN[context_stop:, anchor_len:context_stop] = True
    _see_causally(visible_NN, context_stop, num_rows)
    return visible_NN


def _see_causally(visible_NN: Tensor, start: int, stop: int) -> None:
    for row in range(start, stop):
        visible_NN[row, start : row + 1] = True


def _select(statement: Statement, block_idx: int, layer: _Layer, kv_head: int) -> list[int]:
    """Tokens of the block that one KV head passes on."""
    barred = statement.shown_len if block_idx == 0 else 0
    even_len = statement.even_lens[block_idx]
    budget = 0 if statement.star else min(statement.passing_len, even_len - barred)
    if statement.layer_passing_lens:
        budget = statement.layer_passing_lens[layer.layer_idx][block_idx]
    scores_B = _scores(statement, block_idx, layer, kv_head)
    open_to = range(barred, len(scores_B))
    return sorted(open_to, key=lambda token: (-float(scores_B[token]), token))[:budget]


def _scores(statement: Statement, block_idx: int, layer: _Layer, kv_head: int) -> Tensor:
    block, groups = layer.block(statement, block_idx), len(layer.q_HND) // len(layer.k_KND)
    heads = slice(kv_head * groups, (kv_head + 1) * groups)
    q_GBD, k_BD = block.q_HSD[heads], block.k_KSD[kv_head]
    if statement.compressor == "knorm":
        norms_B: Tensor = k_BD.norm(dim=-1)
        return -norms_B
    if statement.compressor == "query":
        question = range(statement.splice, statement.splice + len(statement.spliced))
        blind = not question or (block_idx == 0 and not statement.shared)
        q_GWD = q_GBD[:, -statement.window :] if blind else layer.q_HND[heads][:, list(question)]
        return _pooled((q_GWD @ k_BD.T).mean(dim=(0, 1)), statement.kernel)
    if statement.compressor == "window":
        return _pooled(_window_scores(q_GBD, k_BD, statement.window, layer.scale), statement.kernel)
    return torch.tensor(_listed_scores(statement, block, kv_head))


def _listed_scores(statement: Statement, block: BlockView, kv_head: int) -> list[float]:
    details = dict(statement.details)
    if statement.compressor == "expected_attention":
        embedding: Any = hf_model(statement.model).base_model.rotary_emb
        rotary = Rotary(embedding.inv_freq, float(embedding.attention_scaling))
        return expected_attention_scores(block, kv_head, rotary, **details)
    if statement.compressor == "lag_kv":
        return lag_scores(block, kv_head, **details)
    plain = {"keydiff": keydiff_scores, "tova": tova_scores}
    if statement.compressor == "fusion":
        members = [plain[name](block, kv_head) for name in details["members"]]
        return fused(members, details["weights"], details["constant"])
    return plain[statement.compressor](block, kv_head)


def _window_scores(q_GBD: Tensor, k_BD: Tensor, window: int, scale: float) -> Tensor:
    length = k_BD.shape[0]
    rows: Sequence[int] = range(max(0, length - window), length)
    total_B = torch.zeros(length)
    for q_BD in q_GBD:
        for row in rows:
            total_B[: row + 1] += (q_BD[row] @ k_BD[: row + 1].T * scale).softmax(dim=-1)
    return total_B


def _pooled(scores_B: Tensor, kernel: int) -> Tensor:
    reach = kernel // 2
    best = [
        scores_B[max(0, token - reach) : token + reach + 1].max()
        for token in range(scores_B.shape[0])
    ]
    return torch.stack(best)
