"""Forward passes of a request on one rank: prefill the context, then extend it by new tokens.

Every rank runs the same steps. Rank 0, the owner, holds the new tokens' KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs
from apb.cache import CacheShape, KVCacheShard
from apb.comm import Communicator, Kind, Tag
from apb.errors import RequestError
from apb.methods.attended import BlockObserver
from apb.methods.audit import Auditor
from apb.methods.base import Attend, AttentionMethod, PrefillContext
from apb.methods.decode import FEW_ROWS, OWNER, ShardedDecode
from apb.methods.handoff import HandOff
from apb.methods.placement import Placement
from apb.methods.plan import PrefillPlan, RankRows
from apb.prompts.base import PromptTokens
from apb.speculate.tree import DraftTree
from apb.trace.recorder import OFF, Trace
from apb.trace.records import AttendedLayer


class TargetModel(Protocol):
    """What the engine needs of a model."""

    @property
    def device(self) -> torch.device: ...
    @property
    def cache_shape(self) -> CacheShape: ...
    def forward(
        self, token_ids: Sequence[int], positions_T: Tensor, attend: Attend, trace: Trace = OFF
    ) -> Tensor: ...
    def logits(self, hidden_TM: Tensor) -> Tensor: ...


class Engine:
    """Runs one request at a time; all ranks call the same methods in the same order."""

    def __init__(
        self,
        *,
        model: TargetModel,
        method: AttentionMethod,
        backend: AttentionBackend,
        comm: Communicator,
        on_layer: Callable[[int], None] = lambda layer_idx: None,
        interrupt: Callable[[bool], None] = lambda is_last: None,
        trace: Trace = OFF,
    ) -> None:
        """`on_layer` follows each layer's attention of a prefill.

        So does `interrupt`, which may raise RequestError on all ranks and is told whether the layer
        is the last. It follows those of `extend` too, where all ranks read more than a few rows.
        """
        self.model, self.comm = model, comm
        self._method, self._backend = method, backend
        self._on_layer, self._interrupt = on_layer, interrupt
        self._trace = trace
        self._observer: BlockObserver | None = None
        self._alone = Communicator(OWNER, 1, comm.device)
        self._gathered = False
        self._context_rows = 0
        self.step = 0
        self._cache: KVCacheShard | None = None
        self._decode: ShardedDecode | None = None
        self.next_position = 0

    def prefill(
        self,
        prompt: PromptTokens,
        plan: PrefillPlan,
        *,
        room: int,
        placement: Placement = Placement.sharded,
        method: AttentionMethod | None = None,
        auditor: Auditor | None = None,
    ) -> RankRows:
        """Fill the cache with the context. The query only steers the anchor here.

        Returns what this rank has run.

        Args:
            prompt: the context and the query that steers the compression (may be empty).
            plan: from `AttentionMethod.plan`, the same on every rank.
            room: how many new tokens the owner must be able to cache afterwards.
            placement: `sharded`, or `rank0` to move all KV to the owner on the way.
            method: whose plan it is, if not the engine's own method's.
            auditor: looks on.
        """
        assert placement is not Placement.auto, "the placement has to be chosen before"
        self.release()
        self._gathered = placement is Placement.rank0
        self._cache = self._new_cache(plan, room)
        step = self._next_step()
        hand_off = HandOff(
            plan.layout, self.model.cache_shape, self.comm, step=step, cache=self._cache
        )
        rows = plan.rows(self.comm.rank, prompt.context_ids, prompt.query_ids)
        context = PrefillContext(
            plan=plan,
            rows=rows,
            cache=self._cache if self._cache is not None and not self._gathered else hand_off,
            comm=self.comm,
            backend=self._backend,
            step=step,
            auditor=auditor,
            trace=self._trace,
        )
        attend = self._interruptible(self._observed((method or self._method).begin(context)))
        try:
            positions_T = self._positions(rows.positions)
            self.model.forward(rows.token_ids, positions_T, attend, self._trace)
        except RequestError:  # given up by all ranks after the same layer: nothing stays under way
            hand_off.finish()
            self.comm.verify()
            raise
        hand_off.finish()
        self.comm.settle(step, self.model.cache_shape.num_layers)
        self.next_position = plan.layout.context_len
        if self._cache is not None:
            cached = hand_off.positions() if self._gathered else rows.positions[rows.local]
            self._cache.commit(self._positions(cached))
            self._context_rows = len(self._cache)
            self._observer = self._new_observer(plan, self._cache)
            self._decode = ShardedDecode(
                self._cache, self.decode_comm, self._backend, self._observer
            )
        return rows

    def _new_observer(self, plan: PrefillPlan, cache: KVCacheShard) -> BlockObserver | None:
        """Who looks at what the answer attends to, where a trace wants to know."""
        if not self._trace.is_on:
            return None
        ranks = range(self.comm.world_size) if self._gathered else (self.comm.rank,)
        blocks = [block for rank in ranks for block in plan.layout.owned_by(rank)]
        return BlockObserver(blocks, cache, num_layers=self.model.cache_shape.num_layers)

    def _new_cache(self, plan: PrefillPlan, room: int) -> KVCacheShard | None:
        """Room for what this rank will hold; None where that is nothing."""
        if self._gathered and not self.is_owner:
            return None
        layout = plan.layout
        tokens = layout.context_len if self._gathered else layout.tokens_on(self.comm.rank)
        capacity = tokens + (room if self.is_owner else 0)
        return KVCacheShard(self.model.cache_shape, capacity=capacity, device=self.model.device)

    def _positions(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(positions, dtype=torch.int64, device=self.model.device)

    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Hidden states ``[T, M]`` of new tokens, which see the context and causally each other.

        A rank that has handed its shard over returns none.
        """
        step = self._next_step()
        start = self.next_position
        self.next_position += len(token_ids)
        if not self.is_owner and not self.decodes_together:
            return torch.empty((0, 0), device=self.model.device)
        assert self._cache is not None, "extend before prefill"
        assert self._decode is not None
        positions_T = torch.arange(start, self.next_position, device=self.model.device)
        self._decode.begin(step)
        attend: Attend = self._decode.attend
        if len(token_ids) > FEW_ROWS and self.decodes_together:
            attend = self._interruptible(attend)
        try:
            hidden_TM = self.model.forward(token_ids, positions_T, attend)
        except RequestError:
            self.decode_comm.verify()
            raise
        self.decode_comm.verify()
        if self._observer is not None:
            self._observer.keep([len(token_ids) - 1])
        if self.is_owner:
            self._cache.commit(positions_T)
        return hidden_TM

    def read_tree(self, tree: DraftTree) -> Tensor:
        """Hidden states ``[N, M]`` of a tree's nodes, which see the context and their ancestors.

        `keep` has to follow. A rank that has handed its shard over returns none.
        """
        step = self._next_step()
        if not self.is_owner and not self.decodes_together:
            return torch.empty((0, 0), device=self.model.device)
        assert self._decode is not None, "read_tree before prefill"
        is_tree = self.is_owner and not tree.is_chain
        self._decode.begin(step, tree.visible().to(self.model.device) if is_tree else None)
        positions_N = self._positions([self.next_position + depth for depth in tree.depths])
        hidden_NM = self.model.forward(tree.tokens, positions_N, self._decode.attend)
        self.decode_comm.verify()
        return hidden_NM

    def keep(self, path: Sequence[int]) -> None:
        """Of the tree just read, cache the nodes of a path from the root and forget the others."""
        if self._observer is not None:
            self._observer.keep(path)
        if self.is_owner:
            assert self._cache is not None, "keep before read_tree"
            stop = self.next_position + len(path)
            self._cache.keep(path, self._positions(range(self.next_position, stop)))
        self.next_position += len(path)

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens that `extend` has read."""
        self.next_position -= num_tokens
        if self.is_owner:
            assert self._cache is not None, "rewind before prefill"
            self._cache.truncate(len(self._cache) - num_tokens)

    def report(self, value: dict[str, float]) -> list[dict[str, float]]:
        """Every rank's `value`, in rank order, on every rank."""
        return self.comm.all_gather_json(value, Tag(self._next_step(), 0, Kind.REPORT))

    def attended(self) -> list[AttendedLayer]:
        """What the answer attended to on this rank, where a trace wants to know."""
        return [] if self._observer is None else self._observer.findings()

    def where_not_finite(self) -> str:
        """Where the document's keys or values went wrong first, in words; on all ranks."""
        mine = None if self._cache is None else self._cache.first_not_finite(self._context_rows)
        layers = self.comm.all_gather_json(mine, Tag(self._next_step(), 0, Kind.REPORT))
        found = [(layer, rank) for rank, layer in enumerate(layers) if layer is not None]
        if not found:
            return "the document's keys and values are finite"
        layer, rank = min(found)
        return f"the document's keys and values are not from layer {layer} on, on rank {rank} first"

    def release(self) -> None:
        """Give the cache's memory back."""
        self._cache = self._decode = self._observer = None

    @property
    def is_owner(self) -> bool:
        return self.comm.rank == OWNER

    @property
    def decodes_together(self) -> bool:
        """Whether every rank takes part in decoding: all do unless the cache was handed over."""
        return not self._gathered or self.comm.world_size == 1

    @property
    def decode_comm(self) -> Communicator:
        """Whom this rank decodes with: everyone, or nobody."""
        return self.comm if self.decodes_together else self._alone

    def _interruptible(self, attend: Attend) -> Attend:
        last = self.model.cache_shape.num_layers - 1

        def interruptible(layer: LayerInputs) -> Tensor:
            out_THD = attend(layer)
            self._interrupt(layer.layer_idx == last)
            return out_THD

        return interruptible

    def _observed(self, attend: Attend) -> Attend:
        def observed(layer: LayerInputs) -> Tensor:
            out_THD = attend(layer)
            self._trace.sample()
            self._on_layer(layer.layer_idx)
            return out_THD

        return observed

    def _next_step(self) -> int:
        self.step += 1
        return self.step
