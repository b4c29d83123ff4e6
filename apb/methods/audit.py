"""How much an approximate prefill lost, measured on a sample of rows while it runs.

The sampled rows' queries visit every rank, each of which attends to its own true keys; merged, that
is exact attention of the same queries over the same keys and values, without moving any KV.

Letters: N sampled rows of all ranks, M the most on one rank, R ranks, h sampled query heads, S this
rank's context tokens, U upstream keys, D head dim.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.base import AttentionPartial, LayerInputs, merge_partials
from apb.comm import Communicator, Kind, Tag
from apb.cost import ModelShape
from apb.layout import Block
from apb.methods.plan import PrefillPlan, RankRows
from apb.output import LayerFinding


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSample:
    """How many rows, heads and layers are looked at; fewer where there are not as many."""

    rows: int = 32
    heads: int = 4
    layers: int = 8


class _OwnKeys(NamedTuple):
    """This rank's context keys for the sampled rows of all ranks."""

    scores_hNS: Tensor
    v_hSD: Tensor
    positions_S: Tensor
    earlier_NS: Tensor
    """Whether a key is at or before a row."""


class Auditor:
    """Compares sampled attention outputs of one prefill with exact attention."""

    def __init__(
        self,
        sample: AuditSample,
        plan: PrefillPlan,
        comm: Communicator,
        shape: ModelShape,
        *,
        seed: int,
    ) -> None:
        self._plan, self._comm = plan, comm
        context_len, layout = plan.layout.context_len, plan.layout
        count = min(sample.rows, context_len)
        rng = random.Random(seed)
        edges = [context_len * index // count for index in range(count + 1)]
        positions = [rng.randrange(*edges[index : index + 2]) for index in range(count)]
        starts = [block.start for block in layout.blocks]
        rows = [
            (position, layout.blocks[bisect_right(starts, position) - 1]) for position in positions
        ]
        self._rows_of = [
            [(position, block) for position, block in rows if block.rank == rank]
            for rank in range(layout.world_size)
        ]
        self._heads = spread_indices(shape.num_heads, sample.heads)
        self._group = shape.num_heads // shape.num_kv_heads
        self._layers = frozenset(spread_indices(shape.num_layers, sample.layers))
        self._found: list[tuple[int, float, float]] = []

    def observe(self, layer: LayerInputs, rows: RankRows, out_THD: Tensor, k_KUD: Tensor) -> None:
        """Look at one layer's result, on all ranks; `k_KUD` are this rank's upstream keys."""
        if layer.layer_idx not in self._layers:
            return
        own = self._rows_of[self._comm.rank]
        packed = [_packed_row(rows, block, position) for position, block in own]
        q_NhD = self._gather(layer, layer.q_HTD[self._heads][:, packed].transpose(0, 1).float())
        keys = self._own_keys(layer, rows, q_NhD)
        exact, shown_lse_Nh = self._merge(layer, keys)
        first = sum(map(len, self._rows_of[: self._comm.rank]))
        for row, (place, (_, block)) in enumerate(zip(packed, own, strict=True), start=first):
            in_block_S = keys.earlier_NS[row] & (keys.positions_S >= block.start)
            seen = [_lse(keys.scores_hNS[:, row], in_block_S)]
            if block.index > 0:
                upstream_len = self._plan.in_layer(layer.layer_idx).upstream_len(block.index)
                passing = slice(len(self._plan.anchor), upstream_len)
                seen.append(self._passing_lse(q_NhD[row], k_KUD[:, passing], layer.scale))
                seen.append(shown_lse_Nh[row])
            mass = torch.stack(seen).sub(exact.lse_TH[row]).exp().sum(dim=0).mean()
            wanted_hD = exact.out_THD[row]
            error = (out_THD[place, self._heads].float() - wanted_hD).norm()
            error /= wanted_hD.norm().clamp_min(1e-30)
            self._found.append((layer.layer_idx, float(mass), float(error)))

    def _own_keys(self, layer: LayerInputs, rows: RankRows, q_NhD: Tensor) -> _OwnKeys:
        kv_heads = [head // self._group for head in self._heads]
        k_hSD, v_hSD = (x[:, rows.local][kv_heads].float() for x in (layer.k_KTD, layer.v_KTD))
        positions_S = torch.tensor(
            rows.positions[rows.local], dtype=torch.int64, device=k_hSD.device
        )
        sampled = [position for rank_rows in self._rows_of for position, _ in rank_rows]
        sampled_N1 = torch.tensor(sampled, device=k_hSD.device)[:, None]
        scores_hNS = q_NhD.transpose(0, 1) @ k_hSD.mT * layer.scale
        return _OwnKeys(scores_hNS, v_hSD, positions_S, positions_S <= sampled_N1)

    def findings(self) -> list[LayerFinding]:
        """The audited layers, over the rows of all ranks; the same on every rank."""
        tag = Tag(0, 0, Kind.REPORT)
        found = [
            tuple(row) for rank in self._comm.all_gather_json(self._found, tag) for row in rank
        ]
        result = []
        for layer_idx in sorted(self._layers):
            rows = [(mass, error) for index, mass, error in found if index == layer_idx]
            if rows:
                mass, error = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
                result.append(
                    LayerFinding(layer=layer_idx, recovered_mass=mass, output_error=error)
                )
        return result

    def _gather(self, layer: LayerInputs, q_MhD: Tensor) -> Tensor:
        """The sampled rows of all ranks, in rank order."""
        most = max(map(len, self._rows_of))
        padded_MhD = q_MhD.new_zeros((most, *q_MhD.shape[1:]))
        padded_MhD[: q_MhD.shape[0]] = q_MhD
        tag = Tag(0, layer.layer_idx, Kind.AUDIT)
        gathered_RMhD = self._comm.all_gather(padded_MhD, tag).wait()
        return torch.cat(
            [x_MhD[: len(rows)] for x_MhD, rows in zip(gathered_RMhD, self._rows_of, strict=True)]
        )

    def _merge(self, layer: LayerInputs, keys: _OwnKeys) -> tuple[AttentionPartial, Tensor]:
        """Exact attention, and the log-sum-exp ``[N, h]`` over the keys that the anchor shows."""
        lse_hN = _lse(keys.scores_hNS, keys.earlier_NS)
        peak_hN1 = lse_hN.masked_fill(lse_hN == -torch.inf, 0.0)[..., None]
        probs_hNS = (keys.scores_hNS - peak_hN1).exp().masked_fill(~keys.earlier_NS, 0.0)
        shown_S = keys.positions_S < self._plan.anchor.context_len
        shown_lse_hN = _lse(keys.scores_hNS, keys.earlier_NS & shown_S)
        out_hND = probs_hNS @ keys.v_hSD
        packed_hNE = torch.cat([out_hND, lse_hN[..., None], shown_lse_hN[..., None]], dim=-1)
        tag = Tag(0, layer.layer_idx, Kind.AUDIT)
        gathered_RNhE = self._comm.all_gather(packed_hNE.transpose(0, 1).contiguous(), tag).wait()
        exact = merge_partials(
            [AttentionPartial(x_NhE[..., :-2], x_NhE[..., -2]) for x_NhE in gathered_RNhE]
        )
        return exact, gathered_RNhE[..., -1].logsumexp(dim=0)

    def _passing_lse(self, q_hD: Tensor, k_KUD: Tensor, scale: float) -> Tensor:
        k_hUD = k_KUD[[head // self._group for head in self._heads]].float()
        scores_hU = (k_hUD @ q_hD[..., None])[..., 0] * scale
        return scores_hU.logsumexp(dim=-1)


def _packed_row(rows: RankRows, block: Block, position: int) -> int:
    """Where a context token stands in the packed rows of its rank."""
    start = next(place.start for owned, place in rows.blocks if owned.index == block.index)
    return int(start + position - block.start)


def _lse(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, -torch.inf).logsumexp(dim=-1)


def spread_indices(total: int, count: int) -> Sequence[int]:
    """At most `count` indices, evenly over ``range(total)``."""
    count = min(count, total)
    return [total * (2 * index + 1) // (2 * count) for index in range(count)]
