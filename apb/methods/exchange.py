"""How anchor and passing KV travel between ranks in one layer of a prefill.

Letters: A anchor tokens, P passing tokens per block (padded to the longest), N blocks per rank
(padded), U upstream keys (anchor, then the passing blocks in order), W query tokens, R ranks, K
key/value heads, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from apb.attention.base import LayerInputs
from apb.comm import Communicator, Kind, Pending, Tag
from apb.compress.base import PassingBlock
from apb.methods.plan import AnchorForm, PrefillPlan, RankRows


class AnchorKV(NamedTuple):
    """The anchor in one layer: its KV and the query vectors of the question spliced into it."""

    k_KAD: Tensor
    v_KAD: Tensor
    query_HWD: Tensor


class ContextExchange:
    """Moves one request's anchor and passing blocks, one layer at a time."""

    def __init__(self, plan: PrefillPlan, rows: RankRows, comm: Communicator, *, step: int) -> None:
        self._plan, self._rows, self._comm, self._step = plan, rows, comm, step
        self._upstream_2KUD: Tensor | None = None

    def start_anchor(self, layer: LayerInputs) -> Pending | None:
        """Send or ask for the anchor; None where every rank that needs it has its own copy."""
        if self._plan.anchor_form is AnchorForm.replicated or not len(self._plan.anchor):
            return None
        anchor = self._own_anchor(layer)
        num_heads, head_dim = layer.q_HTD.shape[0], layer.q_HTD.shape[2]
        kv_heads = layer.k_KTD.shape[0]
        size = head_dim * (
            2 * kv_heads * len(self._plan.anchor) + num_heads * self._plan.anchor.query_len
        )
        source = self._plan.layout.blocks[0].rank
        is_source = self._comm.rank == source
        message = layer.k_KTD.new_empty(size, device=None if is_source else "meta")
        if is_source:
            for part, tensor in zip(self._split_anchor(message, layer), anchor, strict=True):
                part.copy_(tensor)
        tag = Tag(self._step, layer.layer_idx, Kind.ANCHOR)
        return self._comm.broadcast(message, tag, src=source)

    def finish_anchor(self, layer: LayerInputs, pending: Pending | None) -> AnchorKV:
        """This rank's view of the anchor, received or its own; empty where there is none."""
        return (
            self._own_anchor(layer)
            if pending is None
            else self._split_anchor(pending.wait(), layer)
        )

    def start_passing(self, layer: LayerInputs, passing: Sequence[PassingBlock]) -> Pending | None:
        """Send this rank's passing blocks to all ranks; None where there is nothing to send."""
        longest = max(self._plan.passing_lens, default=0)
        if longest == 0:
            return None
        layout = self._plan.layout
        most_blocks = max(len(layout.owned_by(rank)) for rank in range(layout.world_size))
        kv_heads, _, head_dim = layer.k_KTD.shape
        message_2NKPD = layer.k_KTD.new_empty((2, most_blocks, kv_heads, longest, head_dim))
        for slot, (k_KPD, v_KPD) in enumerate(passing):
            message_2NKPD[0, slot, :, : k_KPD.shape[1]] = k_KPD
            message_2NKPD[1, slot, :, : v_KPD.shape[1]] = v_KPD
        return self._comm.all_gather(message_2NKPD, Tag(self._step, layer.layer_idx, Kind.PASSING))

    def upstream(self, anchor: AnchorKV, pending: Pending | None) -> tuple[Tensor, Tensor]:
        """Keys and values ``[K, U, D]``: the anchor, then the passing blocks that are needed here.

        Block ``b`` attends to the first ``plan.upstream_len(b)`` of them. The buffer is reused by
        the next layer.
        """
        last = max((block.index for block, _ in self._rows.blocks), default=0)
        kv_heads, _, head_dim = anchor.k_KAD.shape
        shape = (2, kv_heads, self._plan.upstream_len(last), head_dim)
        if self._upstream_2KUD is None:
            self._upstream_2KUD = anchor.k_KAD.new_empty(shape)
        upstream_2KUD = self._upstream_2KUD
        if last > 0:
            upstream_2KUD[0, :, : len(self._plan.anchor)] = anchor.k_KAD
            upstream_2KUD[1, :, : len(self._plan.anchor)] = anchor.v_KAD
        if pending is not None:
            self._unpack(pending.wait(), upstream_2KUD, last)
        return upstream_2KUD[0], upstream_2KUD[1]

    def _unpack(self, received_R2NKPD: Tensor, upstream_2KUD: Tensor, last: int) -> None:
        layout = self._plan.layout
        start = len(self._plan.anchor)
        for block in layout.blocks[:last]:
            slot = layout.owned_by(block.rank).index(block)
            length = self._plan.passing_lens[block.index]
            upstream_2KUD[:, :, start : start + length] = received_R2NKPD[
                block.rank, :, slot, :, :length
            ]
            start += length

    def _own_anchor(self, layer: LayerInputs) -> AnchorKV:
        rows = self._rows.anchor
        query = self._plan.anchor.query_rows if rows.stop else slice(0, 0)
        return AnchorKV(layer.k_KTD[:, rows], layer.v_KTD[:, rows], layer.q_HTD[:, rows][:, query])

    def _split_anchor(self, message: Tensor, layer: LayerInputs) -> AnchorKV:
        num_heads, _, head_dim = layer.q_HTD.shape
        shape_KAD = (layer.k_KTD.shape[0], len(self._plan.anchor), head_dim)
        shape_HWD = (num_heads, self._plan.anchor.query_len, head_dim)
        kv_size = shape_KAD[0] * shape_KAD[1] * shape_KAD[2]
        keys, values, queries = message.split([kv_size, kv_size, message.numel() - 2 * kv_size])
        return AnchorKV(keys.view(shape_KAD), values.view(shape_KAD), queries.view(shape_HWD))
