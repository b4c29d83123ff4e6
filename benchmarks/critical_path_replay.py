"""One rank alone: a communicator that makes up what the other ranks would have sent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, AttentionPartial, LayerInputs
from apb.comm import Communicator, Pending, Tag
from apb.cost import ModelShape
from apb.methods.base import AttentionMethod, KVSink, PrefillContext
from apb.methods.plan import PrefillPlan

_STD = 0.1

Messages = dict[tuple[int, torch.Size, torch.dtype], Tensor]
"""Random messages by the rank they come from, shape and dtype."""


class ReplayCommunicator(Communicator):
    """Claims to be a rank among others; whatever is waited for has arrived, and is random.

    What this rank sends is packed as for a real link and then dropped. Each message is drawn once
    and handed out again and again; `draw_messages` does so before anything is measured. Pass the
    same `messages` to several communicators to share them.
    """

    def __init__(
        self, rank: int, world_size: int, device: torch.device, messages: Messages | None = None
    ) -> None:
        Communicator.__init__(self, rank, world_size, device, defer_checks=device.type == "cuda")
        self._messages: Messages = {} if messages is None else messages

    def all_gather(self, x: Tensor, tag: Tag) -> Pending[Tensor]:
        if self.world_size == 1:
            return Pending(lambda: x[None])
        sent_U = self._pack(x, tag)
        others = {rank: self._message(rank, x, tag) for rank in self._others}
        received_RU = torch.stack([others.get(rank, sent_U) for rank in range(self.world_size)])
        return Pending(lambda: self._accept(received_RU, range(self.world_size), tag, x))

    def broadcast(self, x: Tensor, tag: Tag, *, src: int) -> Pending[Tensor]:
        if self.world_size == 1:
            return Pending(lambda: x)
        buffer_U = self._pack(x, tag) if self.rank == src else self._message(src, x, tag)
        return Pending(lambda: self._accept(buffer_U[None], [src], tag, x)[0])

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], tag: Tag
    ) -> Pending[dict[int, Tensor]]:
        sent = {rank: self._pack(x, tag) for rank, x in outgoing.items()}
        received = {rank: self._message(rank, x, tag) for rank, x in incoming.items()}

        def finish() -> dict[int, Tensor]:
            sent.clear()
            return {
                rank: self._accept(buffer_U[None], [rank], tag, incoming[rank])[0]
                for rank, buffer_U in received.items()
            }

        return Pending(finish)

    def verify(self) -> None:
        """The messages were made here, so there is nothing to check."""
        self._unverified.clear()

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _message(self, source: int, like: Tensor, tag: Tag) -> Tensor:
        """A message of the shape and dtype of `like`: normal values, or zeros of an integer."""
        key = (source, like.shape, like.dtype)
        if key not in self._messages:
            payload = torch.zeros(like.shape, dtype=like.dtype, device=self.device)
            if like.is_floating_point():
                payload.normal_(std=_STD)
            self._messages[key] = self._pack(payload, tag)
        return self._messages[key]


def draw_messages(
    comm: ReplayCommunicator,
    method: AttentionMethod,
    plan: PrefillPlan,
    shape: ModelShape,
    dtype: torch.dtype,
) -> None:
    """Draw what the method will ask for, by a layer of zeros without attention."""
    tokens = (0,) * plan.layout.context_len
    rows = plan.rows(comm.rank, tokens, (0,) * plan.anchor.query_len)
    context = PrefillContext(
        plan=plan, rows=rows, cache=_NoCache(), comm=comm, backend=_NoAttention(), step=0
    )
    q_HTD, k_KTD, v_KTD = (
        torch.zeros((heads, len(rows.positions), shape.head_dim), dtype=dtype, device=comm.device)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )
    method.begin(context)(LayerInputs(0, q_HTD, k_KTD, v_KTD, 1.0))


class _NoCache(KVSink):
    def write(self, layer_idx: int, k_KTD: Tensor, v_KTD: Tensor) -> None:
        """Keep nothing."""


class _NoAttention(AttentionBackend):
    def attend_segment(
        self, q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, *, causal: bool, scale: float
    ) -> AttentionPartial:
        num_heads, num_rows, head_dim = q_HTD.shape
        return AttentionPartial.empty(num_rows, num_heads, head_dim, q_HTD)
