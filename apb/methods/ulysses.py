"""DeepSpeed-Ulysses: ranks trade rows for heads, attend to everything, and trade back.

Letters: N all rows of the context, T this rank's rows, H query heads, h a rank's share of them, k
the key/value heads that these need, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.balance import causal_pairs
from apb.comm import Kind, Tag
from apb.cost import ModelShape, Workload
from apb.errors import InputError
from apb.layout import LayoutPolicy
from apb.methods.base import Attend, AttentionMethod, MethodConfig, PrefillContext
from apb.methods.plan import PlanRequest, PrefillPlan, cut_context


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads that a rank attends with: neighbouring query heads, and the KV heads they use.

    A KV head whose group is split goes to every rank that has a part of the group.
    """

    start: int
    stop: int
    group: int
    """Query heads per KV head."""

    @classmethod
    def of(cls, rank: int, *, world_size: int, num_heads: int, num_kv_heads: int) -> HeadShare:
        start, stop = (num_heads * edge // world_size for edge in (rank, rank + 1))
        return cls(start, stop, num_heads // num_kv_heads)

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self._first_key, self._first_key + self.num_keys)

    @property
    def num_keys(self) -> int:
        return (self.stop - 1) // self.group - self._first_key + 1

    @property
    def _first_key(self) -> int:
        return self.start // self.group

    def __len__(self) -> int:
        return self.stop - self.start

    def per_query_head(self, x_kND: Tensor) -> Tensor:
        """KV heads with equally many query heads each: as they are, or one per query head."""
        whole_groups = self.start % self.group == 0 and self.stop % self.group == 0
        if self.num_keys == 1 or whole_groups:
            return x_kND
        index = [head // self.group - self._first_key for head in range(self.start, self.stop)]
        return x_kND[index]


class UlyssesMethod(AttentionMethod):
    """Exact (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509). Any number of heads and ranks,
    as long as every rank gets a query head.
    """

    def plan(self, request: PlanRequest) -> PrefillPlan:
        num_heads, world_size = request.costs.shape.num_heads, request.world_size
        if world_size > num_heads:
            raise InputError(
                f"method=ulysses gives each rank at least one of the model's {num_heads} query "
                f"heads, which {world_size} ranks exceed: use at most {num_heads} ranks, or "
                "method=zigzag"
            )
        if request.num_blocks not in (None, world_size):
            raise InputError(
                f"num_blocks={request.num_blocks} does not apply to method=ulysses, which runs one "
                f"block per rank: drop num_blocks or set it to {world_size}"
            )
        layout, notes = cut_context(request, LayoutPolicy.even, min_block_len=1)
        return PrefillPlan(layout, passing_lens=(0,) * len(layout.blocks), notes=notes)

    def begin(self, context: PrefillContext) -> Attend:
        return _UlyssesPrefill(context).attend

    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        layout = plan.layout
        share = HeadShare.of(
            rank,
            world_size=layout.world_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
        )
        own, others = layout.tokens_on(rank), layout.context_len - layout.tokens_on(rank)
        heads_in = others * (len(share) + 2 * share.num_keys)
        rows_in = own * (shape.num_heads - len(share))
        return Workload(
            rows=own,
            head_pairs=len(share) * causal_pairs(layout.context_len),
            received=(heads_in + rows_in) * shape.head_dim,
            messages=2 if layout.world_size > 1 else 0,
            overlaps=False,
        )


class _UlyssesPrefill:
    """One prefill on one rank."""

    def __init__(self, context: PrefillContext) -> None:
        self._context = context
        self._ranks = range(context.comm.world_size)
        self._tokens = [context.plan.layout.tokens_on(rank) for rank in self._ranks]

    def attend(self, layer: LayerInputs) -> Tensor:
        self._context.cache.write(layer.layer_idx, layer.k_KTD, layer.v_KTD)
        shares = [
            HeadShare.of(
                rank,
                world_size=len(self._ranks),
                num_heads=layer.q_HTD.shape[0],
                num_kv_heads=layer.k_KTD.shape[0],
            )
            for rank in self._ranks
        ]
        own = shares[self._context.comm.rank]
        heads_NED = self._trade_rows_for_heads(layer, shares)
        q_NhD, k_NkD, v_NkD = heads_NED.split([len(own), own.num_keys, own.num_keys], dim=1)
        keys, values = (own.per_query_head(x_NkD.transpose(0, 1)) for x_NkD in (k_NkD, v_NkD))
        segment = Segment(0, heads_NED.shape[0], keys, values, causal=True)
        partial = self._context.backend.attend(q_NhD.transpose(0, 1), [segment], scale=layer.scale)
        return self._trade_heads_for_rows(layer, partial.out_THD.to(layer.q_HTD.dtype), shares)

    def _trade_rows_for_heads(self, layer: LayerInputs, shares: list[HeadShare]) -> Tensor:
        """All rows of this rank's heads, ``[N, h + 2k, D]``: queries, then keys, then values."""

        def of(share: HeadShare) -> Tensor:
            keys, values = layer.k_KTD[share.keys], layer.v_KTD[share.keys]
            return torch.cat([layer.q_HTD[share.queries], keys, values]).transpose(0, 1)

        own = shares[self._context.comm.rank]
        num_heads, head_dim = len(own) + 2 * own.num_keys, layer.q_HTD.shape[2]
        rows = self._exchange(
            layer,
            Kind.HEADS,
            outgoing=[of(share) for share in shares],
            incoming=[(tokens, num_heads, head_dim) for tokens in self._tokens],
        )
        return torch.cat(rows)  # ranks hold neighbouring blocks, in order

    def _trade_heads_for_rows(
        self, layer: LayerInputs, out_NhD: Tensor, shares: list[HeadShare]
    ) -> Tensor:
        """All heads of this rank's rows, ``[T, H, D]``."""
        own_tokens = self._tokens[self._context.comm.rank]
        heads = self._exchange(
            layer,
            Kind.ROWS,
            outgoing=list(out_NhD.split(self._tokens)),
            incoming=[(own_tokens, len(share), out_NhD.shape[2]) for share in shares],
        )
        return torch.cat(heads, dim=1)

    def _exchange(
        self,
        layer: LayerInputs,
        kind: Kind,
        *,
        outgoing: list[Tensor],
        incoming: list[tuple[int, ...]],
    ) -> list[Tensor]:
        """One tensor to and from every rank, in rank order; none travels empty or to itself."""
        rank = self._context.comm.rank
        empty = [layer.q_HTD.new_empty(shape, device="meta") for shape in incoming]
        arrived = self._context.comm.exchange(
            {r: x for r, x in enumerate(outgoing) if r != rank and x.numel()},
            {r: x for r, x in enumerate(empty) if r != rank and x.numel()},
            Tag(self._context.step, layer.layer_idx, kind),
        ).wait()
        arrived[rank] = outgoing[rank]
        return [arrived.get(r, layer.q_HTD.new_empty(shape)) for r, shape in enumerate(incoming)]


@dataclass(kw_only=True, slots=True)
class UlyssesConfig(MethodConfig):
    """Config of `UlyssesMethod`."""

    def build(self, *, seed: int) -> UlyssesMethod:
        return UlyssesMethod()
