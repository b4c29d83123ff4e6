"""Which blocks of the document the answer attended to, seen in a few layers of its own passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.base import LayerInputs
from apb.cache import KVCacheShard
from apb.layout import Block
from apb.methods.audit import spread_indices
from apb.trace.records import SINK_TOKENS, AttendedLayer

MAX_TOKENS = 128
"""Of an answer, its first ones: each costs a second look at the keys of some layers."""
_LAYERS = 8
_TOGETHER = 32
"""Rows that wait for one another, as most of a look at the keys is reading them."""
_CHUNK = 8192
"""Keys that are scored at once, which bounds the scores in memory."""


class _Column(NamedTuple):
    """Keys of a shard that are counted together."""

    block: int
    start: int
    stop: int


class _Pass(NamedTuple):
    """One layer's queries, and the log-sum-exp of their scores with all keys of all ranks."""

    q_HTD: Tensor
    lse_TH: Tensor
    scale: float


class BlockObserver:
    """Scores the answer's rows with one rank's document keys once more.

    The merge of partials yields the log-sum-exp over all keys anyway; with it scores become
    probabilities, and no rank has to tell another one anything.
    """

    def __init__(self, blocks: Sequence[Block], cache: KVCacheShard, *, num_layers: int) -> None:
        """`blocks` are those in this rank's cache, in its order."""
        self._columns, self._cache = list(_columns(blocks)), cache
        self._layers = frozenset(spread_indices(num_layers, _LAYERS))
        self._seen: dict[int, _Pass] = {}
        self._waiting: dict[int, list[_Pass]] = {layer_idx: [] for layer_idx in self._layers}
        self._kept: dict[int, list[Tensor]] = {layer_idx: [] for layer_idx in self._layers}
        self._num_kept = self._num_waiting = 0

    def observe(self, layer: LayerInputs, lse_TH: Tensor) -> None:
        """A pass has run that layer; the rows of the last pass are what `keep` is about."""
        if layer.layer_idx in self._layers and self._num_kept < MAX_TOKENS:
            self._seen[layer.layer_idx] = _Pass(layer.q_HTD, lse_TH, layer.scale)

    def keep(self, rows: Sequence[int]) -> None:
        """These rows of the pass have each predicted a token of the answer."""
        if not self._seen:
            return
        for layer_idx, (q_HTD, lse_TH, scale) in self._seen.items():
            kept = _Pass(q_HTD[:, list(rows)].float(), lse_TH[list(rows)].float(), scale)
            self._waiting[layer_idx].append(kept)
        self._seen = {}
        self._num_kept += len(rows)
        self._num_waiting += len(rows)
        if self._num_waiting >= _TOGETHER:
            self._look()

    def _look(self) -> None:
        """Score the rows that wait; the document's keys are the same since the first of them."""
        for layer_idx, waiting in self._waiting.items():
            if not waiting:
                continue
            q_HTD = torch.cat([it.q_HTD for it in waiting], dim=1)
            lse_TH = torch.cat([it.lse_TH for it in waiting])
            shares_THC = self._shares(layer_idx, _Pass(q_HTD, lse_TH, waiting[0].scale))
            found_2TC = torch.stack([shares_THC.mean(dim=1), shares_THC.amax(dim=1)])
            self._kept[layer_idx].append(found_2TC)
            waiting.clear()
        self._num_waiting = 0

    def _shares(self, layer_idx: int, rows: _Pass) -> Tensor:
        """Attention probability ``[T, H, C]`` of the rows on each column."""
        q_HTD, lse_HT1 = rows.q_HTD, rows.lse_TH.mT[..., None]
        k_KSD, _ = self._cache.view(layer_idx)
        kv_heads = k_KSD.shape[0]
        q_KGD, lse_KG1 = (x.reshape(kv_heads, -1, x.shape[-1]) for x in (q_HTD, lse_HT1))
        shares_KGC = q_KGD.new_zeros((*q_KGD.shape[:2], len(self._columns)))
        num_keys = max((column.stop for column in self._columns), default=0)
        for first in range(0, num_keys, _CHUNK):
            last = min(first + _CHUNK, num_keys)
            k_KED = k_KSD[:, first:last].float()
            probs_KGE = torch.baddbmm(-lse_KG1, q_KGD, k_KED.mT, alpha=rows.scale).exp_()
            lengths = [
                max(0, min(last, column.stop) - max(first, column.start))
                for column in self._columns
            ]
            inside = [part.sum(dim=-1) for part in probs_KGE.split(lengths, dim=-1)]
            shares_KGC += torch.stack(inside, dim=-1)
        return shares_KGC.view(*q_HTD.shape[:2], -1).transpose(0, 1)

    def findings(self) -> list[AttendedLayer]:
        self._look()
        blocks = [column.block for column in self._columns]
        return [
            AttendedLayer(layer_idx, blocks, *torch.cat(kept, dim=1).tolist())
            for layer_idx, kept in sorted(self._kept.items())
            if kept
        ]


def _columns(blocks: Sequence[Block]) -> Iterator[_Column]:
    start = 0
    for block in blocks:
        stop = start + len(block)
        if block.index == 0:
            yield _Column(-1, start, min(start + SINK_TOKENS, stop))
            start = min(start + SINK_TOKENS, stop)
        if start < stop:
            yield _Column(block.index, start, stop)
        start = stop
