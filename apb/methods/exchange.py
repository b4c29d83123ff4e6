"""How anchor and passing KV travel between ranks in one layer of a prefill.

A rank's message is its anchor, if it runs the one that all share, and its blocks' passing KV in the
order of the blocks. Every later rank gets the beginning of it that it needs, in one exchange.

Letters: A anchor tokens, P passing tokens of a block, N tokens of a message, Y bytes or elements of
a token on the wire, U upstream keys (anchor, then the passing blocks in order), W query tokens, K
key/value heads, H query heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from apb.attention.base import LayerInputs
from apb.comm import Communicator, Kind, Pending, Tag
from apb.methods.plan import AnchorForm, PrefillPlan, RankRows
from apb.methods.wire import Wire, WireFormat


class _Part(NamedTuple):
    """Where a piece of a rank's message belongs among the upstream keys."""

    source: int
    message: slice
    upstream: slice


class Outbox(NamedTuple):
    """A message that is being written, before it is encoded."""

    kv_N2KD: Tensor
    passing: list[Tensor]
    """Parts of it ``[P, 2, K, D]``, one for each of the rank's blocks."""


class UpstreamRoom:
    """Memory for upstream keys and values, which one layer after the other uses."""

    def __init__(self) -> None:
        self._elements: Tensor | None = None

    def view(self, like: Tensor, *shape: int) -> Tensor:
        """Room of that shape, with anything in it; what was in it before is gone."""
        size = math.prod(shape)
        if self._elements is None or self._elements.numel() < size:
            self._elements = like.new_empty(size)
        return self._elements[:size].view(shape)


class ContextExchange:
    """Moves anchor and passing blocks of the layers that have the same plan, one at a time."""

    def __init__(
        self,
        plan: PrefillPlan,
        rows: RankRows,
        comm: Communicator,
        *,
        step: int,
        wire: WireFormat,
        room: UpstreamRoom,
    ) -> None:
        self._plan, self._rows, self._comm, self._step = plan, rows, comm, step
        self._format = wire
        self._travels = len(plan.anchor) > 0 and plan.anchor_form is AnchorForm.shared
        self._anchor_source = plan.layout.blocks[0].rank
        self._parts = list(self._needed_parts())
        self._sources = {part.source for part in self._parts}
        self._own = [(index, place) for index, place, _ in self._message_parts(comm.rank)]
        self._own_len = max((place.stop for _, place in self._own), default=0)
        others = [rank for rank in range(comm.world_size) if rank != comm.rank]
        self._sent = {rank: self._sent_len(comm.rank, rank) for rank in others}
        self._asked = {rank: self._sent_len(rank, comm.rank) for rank in others}
        self._room = room

    def question(self, layer: LayerInputs) -> Tensor:
        """The query vectors ``[H, W, D]`` of the question in the anchor; waits for a shared one.

        They are needed before anything can be selected and therefore precede the exchange.
        """
        query_rows = self._plan.anchor.query_rows
        if not self._travels:
            return layer.q_HTD[:, self._rows.anchor][:, query_rows]
        num_heads, _, head_dim = layer.q_HTD.shape
        query_HWD = layer.q_HTD.new_empty(
            (num_heads, self._plan.anchor.query_len, head_dim), device="meta"
        )
        if self._comm.rank == self._anchor_source:
            query_HWD = layer.q_HTD[:, self._rows.anchor][:, query_rows]
        tag = Tag(self._step, layer.layer_idx, Kind.QUESTION)
        return self._comm.broadcast(query_HWD, tag, src=self._anchor_source).wait()

    def outbox(self, layer: LayerInputs) -> Outbox:
        """A message with its anchor in it, and with room for what this rank's blocks pass on."""
        kv_N2KD = self._wire(layer).unsent(self._own_len, layer.k_KTD.device)
        passing = []
        for index, place in self._own:
            if index >= 0:
                passing.append(kv_N2KD[place])
            else:
                for which, x_KAD in enumerate(self._own_anchor(layer)):
                    kv_N2KD[place, which] = x_KAD.transpose(0, 1)
        return Outbox(kv_N2KD, passing)

    def message(self, layer: LayerInputs, outbox: Outbox) -> Tensor:
        """What this rank has for later blocks, its own included, as it travels: ``[N, Y]``."""
        return self._wire(layer).encode(outbox.kv_N2KD)

    def start(self, layer: LayerInputs, message_NY: Tensor) -> Pending[dict[int, Tensor]]:
        """Send to later ranks what they need of the message, and ask for what is needed here."""
        wire = self._wire(layer)
        outgoing = {rank: message_NY[:length] for rank, length in self._sent.items() if length}
        incoming = {rank: wire.empty(length) for rank, length in self._asked.items() if length}
        tag = Tag(self._step, layer.layer_idx, Kind.UPSTREAM)
        return self._comm.exchange(outgoing, incoming, tag)

    def upstream(
        self, layer: LayerInputs, message_NY: Tensor, pending: Pending[dict[int, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[K, U, D]``: the anchor, then the passing blocks that are needed here.

        Block ``b`` attends to the first ``plan.upstream_len(b)`` of them. The room is reused by
        the next layer. Own passing blocks take the wire format too, so that results do not depend
        on which rank a block is on.
        """
        wire = self._wire(layer)
        length = self._plan.upstream_len(self._plan.last_block(self._comm.rank))
        upstream_2KUD = self._room.view(layer.k_KTD, 2, wire.num_kv_heads, length, wire.head_dim)
        k_KUD, v_KUD = upstream_2KUD
        if not self._travels and k_KUD.shape[1]:
            k_KUD[:, : len(self._plan.anchor)], v_KUD[:, : len(self._plan.anchor)] = (
                self._own_anchor(layer)
            )
        arrived = {**pending.wait(), self._comm.rank: message_NY}
        decoded = {rank: wire.decode(arrived[rank]) for rank in self._sources}
        for part in self._parts:
            upstream_2KUD[:, :, part.upstream] = decoded[part.source][part.message].permute(
                1, 2, 0, 3
            )
        return k_KUD, v_KUD

    def _wire(self, layer: LayerInputs) -> Wire:
        kv_heads, _, head_dim = layer.k_KTD.shape
        return Wire(self._format, kv_heads, head_dim, layer.k_KTD.dtype)

    def _own_anchor(self, layer: LayerInputs) -> tuple[Tensor, Tensor]:
        return layer.k_KTD[:, self._rows.anchor], layer.v_KTD[:, self._rows.anchor]

    def _message_parts(self, rank: int) -> Iterator[tuple[int, slice, int]]:
        """A message's pieces: the block each belongs to (-1: the anchor), its place, its target."""
        start, plan = 0, self._plan
        if self._travels and rank == self._anchor_source:
            start = len(plan.anchor)
            yield -1, slice(0, start), 0
        for block in plan.layout.owned_by(rank):
            length = plan.passing_lens[block.index]
            target = len(plan.anchor) + sum(plan.passing_lens[: block.index])
            yield block.index, slice(start, start + length), target
            start += length

    def _needed_parts(self) -> Iterator[_Part]:
        last = self._plan.last_block(self._comm.rank)
        for source in range(self._comm.world_size):
            for index, place, target in self._message_parts(source):
                if last > 0 and index < last and place.stop > place.start:
                    stop = target + place.stop - place.start
                    yield _Part(source, place, slice(target, stop))

    def _sent_len(self, source: int, target: int) -> int:
        """How many tokens of its message a rank sends to another."""
        last = self._plan.last_block(target)
        if last == 0:
            return 0
        return max(
            (place.stop for index, place, _ in self._message_parts(source) if index < last),
            default=0,
        )
