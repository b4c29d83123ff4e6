"""Which blocks of the document the answer attended to, seen in a few layers of its own passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.base import LayerInputs
from apb.layout import Block
from apb.methods.audit import spread_indices
from apb.trace.records import SINK_TOKENS, AttendedLayer

MAX_TOKENS = 512
"""Rows that are looked at; one belongs to each token of the answer."""
_LAYERS = 8
_CHUNK = 8192
"""Keys that are scored at once, which bounds the scores in memory."""


class _Columns(NamedTuple):
    """Keys of a shard that are counted together."""

    block: int
    keys: slice


class BlockObserver:
    """Recomputes the scores of the answer's rows with one rank's document keys.

    The log-sum-exp over all keys of all ranks, which the merge of partials yields anyway, makes
    probabilities of them, so that no rank has to tell another one anything.
    """

    def __init__(self, blocks: Sequence[Block], *, num_layers: int) -> None:
        """`blocks` are those in this rank's cache, in its order."""
        self._columns = list(_columns(blocks))
        self._layers = frozenset(spread_indices(num_layers, _LAYERS))
        self._rows = slice(0, 0)
        self._seen: dict[int, Tensor] = {}
        self._kept: dict[int, list[Tensor]] = {layer_idx: [] for layer_idx in self._layers}
        self._num_kept = 0

    def begin(self, rows: slice) -> None:
        """A pass of which those rows may become part of the answer; `keep` says which have."""
        self._rows, self._seen = rows, {}

    def observe(self, layer: LayerInputs, k_KSD: Tensor, lse_TH: Tensor) -> None:
        """Look at one layer; `lse_TH` covers all keys that the rows see, on all ranks."""
        if layer.layer_idx not in self._layers or self._num_kept >= MAX_TOKENS:
            return
        q_HTD, lse_HT = layer.q_HTD[:, self._rows].float(), lse_TH[self._rows].float().mT
        shares_THC = lse_HT.new_zeros((*lse_HT.mT.shape, len(self._columns)))
        for share_TH, (_, keys) in zip(shares_THC.unbind(dim=-1), self._columns, strict=True):
            for start in range(keys.start, keys.stop, _CHUNK):
                k_KCD = k_KSD[:, start : min(start + _CHUNK, keys.stop)]
                share_TH += _shares(q_HTD, k_KCD, lse_HT, layer.scale)
        self._seen[layer.layer_idx] = shares_THC

    def keep(self, rows: Sequence[int]) -> None:
        """Of the rows just looked at, those that predicted a token of the answer each."""
        for layer_idx, shares_THC in self._seen.items():
            kept_THC = shares_THC[list(rows)]
            self._kept[layer_idx].append(torch.stack([kept_THC.mean(dim=1), kept_THC.amax(dim=1)]))
        if self._seen:
            self._num_kept += len(rows)
        self._seen = {}

    def findings(self) -> list[AttendedLayer]:
        blocks = [block for block, _ in self._columns]
        return [
            AttendedLayer(layer_idx, blocks, *torch.cat(kept, dim=1).tolist())
            for layer_idx, kept in sorted(self._kept.items())
            if kept
        ]


def _shares(q_HTD: Tensor, k_KCD: Tensor, lse_HT: Tensor, scale: float) -> Tensor:
    """Attention probability ``[T, H]`` on the keys."""
    kv_heads, _, head_dim = k_KCD.shape
    scores_KGC = (q_HTD.reshape(kv_heads, -1, head_dim) @ k_KCD.float().mT).mul_(scale)
    return (scores_KGC.logsumexp(dim=-1).view_as(lse_HT) - lse_HT).exp().mT


def _columns(blocks: Sequence[Block]) -> Iterator[_Columns]:
    start = 0
    for block in blocks:
        stop = start + len(block)
        if block.index == 0:
            yield _Columns(-1, slice(start, min(start + SINK_TOKENS, stop)))
            start = min(start + SINK_TOKENS, stop)
        if start < stop:
            yield _Columns(block.index, slice(start, stop))
        start = stop
