"""Ring attention: every rank's keys and values travel past all later rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import AttentionPartial, LayerInputs, Segment
from apb.balance import causal_pairs
from apb.comm import Kind, Pending, Tag
from apb.cost import ModelShape, Workload
from apb.layout import LayoutPolicy
from apb.methods.base import Attend, AttentionMethod, MethodConfig, PrefillContext
from apb.methods.plan import PlanRequest, PrefillPlan, cut_context


class RingMethod(AttentionMethod):
    """Exact (Liu et al. 2023, https://arxiv.org/abs/2310.01889), over any layout of blocks.

    A rank's KV goes from neighbour to neighbour, only as far as a later block needs it, while each
    rank attends to the KV that came before.
    """

    def __init__(self, policy: LayoutPolicy) -> None:
        self._policy = policy

    def plan(self, request: PlanRequest) -> PrefillPlan:
        layout, notes = cut_context(request, self._policy, min_block_len=1)
        return PrefillPlan(layout, passing_lens=(0,) * len(layout.blocks), notes=notes)

    def begin(self, context: PrefillContext) -> Attend:
        return _RingPrefill(context).attend

    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        return _workload(plan, shape, rank, farthest_hops(plan))

    def workloads(self, plan: PrefillPlan, shape: ModelShape) -> list[Workload]:
        farthest = farthest_hops(plan)
        ranks = range(plan.layout.world_size)
        return [_workload(plan, shape, rank, farthest) for rank in ranks]


def farthest_hops(plan: PrefillPlan) -> list[int]:
    """How many ranks further the KV of each rank is still needed; 0 where nobody needs it."""
    world_size = plan.layout.world_size
    last = [plan.last_block(rank) for rank in range(world_size)]
    result = []
    for origin in range(world_size):
        own = plan.layout.owned_by(origin)
        hops = reversed(range(1, world_size)) if own else ()
        needed = (hop for hop in hops if last[(origin + hop) % world_size] > own[0].index)
        result.append(next(needed, 0))
    return result


def _workload(plan: PrefillPlan, shape: ModelShape, rank: int, farthest: Sequence[int]) -> Workload:
    pairs = sum(causal_pairs(len(block), block.start) for block in plan.layout.owned_by(rank))
    origins = [origin for hop, origin in _origins(plan, rank) if hop <= farthest[origin]]
    tokens = sum(map(plan.layout.tokens_on, origins))
    return Workload(
        rows=plan.num_rows(rank),
        head_pairs=shape.num_heads * pairs,
        received=tokens * shape.kv_elements,
        messages=len(origins),
    )


def _origins(plan: PrefillPlan, rank: int) -> Iterator[tuple[int, int]]:
    """Whose KV would reach the rank at which hop."""
    world_size = plan.layout.world_size
    return ((hop, (rank - hop) % world_size) for hop in range(1, world_size))


class _RingPrefill:
    """One prefill on one rank."""

    def __init__(self, context: PrefillContext) -> None:
        self._context = context
        self._layout = context.plan.layout
        self._farthest = farthest_hops(context.plan)

    def attend(self, layer: LayerInputs) -> Tensor:
        """The next KV is under way while this rank attends to the last that came."""
        backend = self._context.backend
        self._context.cache.write(layer.layer_idx, layer.k_KTD, layer.v_KTD)
        own_T2KD = torch.stack([layer.k_KTD, layer.v_KTD]).permute(2, 0, 1, 3)
        pending = self._pass_on(layer, 1, own_T2KD)
        partial = backend.attend(layer.q_HTD, list(self._own_segments(layer)), scale=layer.scale)
        # fp32, as a merge per hop would round a 16-bit result again and again.
        partial = AttentionPartial(partial.out_THD.float(), partial.lse_TH)
        for hop, origin in _origins(self._context.plan, self._context.comm.rank):
            came_S2KD = pending.wait().get(self._previous)
            pending = self._pass_on(layer, hop + 1, came_S2KD)
            if came_S2KD is not None:
                segments = list(self._segments(origin, came_S2KD))
                partial = backend.attend(layer.q_HTD, segments, scale=layer.scale, carry=partial)
        pending.wait()
        return partial.out_THD

    @property
    def _previous(self) -> int:
        return (self._context.comm.rank - 1) % self._layout.world_size

    def _pass_on(
        self, layer: LayerInputs, hop: int, kv_S2KD: Tensor | None
    ) -> Pending[dict[int, Tensor]]:
        """Send on what came at the hop before (first: this rank's own), and ask for the next."""
        rank, world_size = self._context.comm.rank, self._layout.world_size
        sent, asked = (rank - hop + 1) % world_size, (rank - hop) % world_size
        outgoing, incoming = {}, {}
        if hop <= self._farthest[sent]:
            assert kv_S2KD is not None, "KV to pass on that never came"
            outgoing[(rank + 1) % world_size] = kv_S2KD
        if hop <= self._farthest[asked]:
            kv_heads, _, head_dim = layer.k_KTD.shape
            incoming[self._previous] = layer.k_KTD.new_empty(
                (self._layout.tokens_on(asked), 2, kv_heads, head_dim), device="meta"
            )
        tag = Tag(self._context.step, layer.layer_idx, Kind.RING)
        return self._context.comm.exchange(outgoing, incoming, tag)

    def _own_segments(self, layer: LayerInputs) -> Iterator[Segment]:
        """Each block, causal over itself and seeing this rank's earlier blocks."""
        for _, rows in self._context.rows.blocks:
            k_KTD, v_KTD = layer.k_KTD[:, rows], layer.v_KTD[:, rows]
            yield Segment(rows.start, rows.stop, k_KTD, v_KTD, causal=True)
            if rows.start:
                earlier = slice(0, rows.start)
                yield Segment(
                    rows.start, rows.stop, layer.k_KTD[:, earlier], layer.v_KTD[:, earlier]
                )

    def _segments(self, origin: int, kv_S2KD: Tensor) -> Iterator[Segment]:
        """Each own block over the blocks of another rank that precede it."""
        k_KSD, v_KSD = kv_S2KD.permute(1, 2, 0, 3)
        sources = self._layout.owned_by(origin)
        for block, rows in self._context.rows.blocks:
            length = sum(len(source) for source in sources if source.index < block.index)
            if length:
                yield Segment(rows.start, rows.stop, k_KSD[:, :length], v_KSD[:, :length])


@dataclass(kw_only=True, slots=True)
class RingConfig(MethodConfig):
    """Config of `RingMethod` over neighbouring blocks."""

    def build(self, *, seed: int) -> RingMethod:
        return RingMethod(LayoutPolicy.even)
