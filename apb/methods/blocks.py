"""Blockwise prefill: each block attends to the anchor, to earlier passing blocks and to itself.

`full` (one block), `star` (the first block as anchor, nothing passed) and `apb` are plans for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.balance import causal_pairs
from apb.compress.base import BlockView, Compressor, CompressorTarget
from apb.cost import ModelShape, Workload
from apb.errors import InputError
from apb.layout import Block, LayoutPolicy
from apb.methods.base import Attend, AttentionMethod, MethodConfig, PrefillContext
from apb.methods.exchange import ContextExchange, UpstreamRoom
from apb.methods.plan import AnchorForm, PrefillPlan
from apb.methods.wire import WireFormat
from apb.trace.records import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSettings:
    """What the blockwise methods have in common; see `BlockConfig`."""

    anchor: AnchorForm = AnchorForm.replicated
    layout: LayoutPolicy = LayoutPolicy.even
    wire: WireFormat = WireFormat.auto
    overlap: bool = True
    min_block_len: int = 1


@dataclass(kw_only=True, slots=True)
class BlockConfig(MethodConfig):
    """What the approximate blockwise methods have in common.

    Attributes:
        anchor: where the anchor runs.
        layout: how blocks are cut and dealt to ranks: `even` (paper), `balanced` or `zigzag`.
        wire: what passing KV looks like between ranks: `auto`, `bfloat16` or `int8`.
        overlap: run local attention while the exchange is under way.
        min_block_len: fewer blocks than ranks are used rather than shorter ones.
    """

    anchor: AnchorForm = MISSING
    layout: LayoutPolicy = LayoutPolicy.even
    wire: WireFormat = WireFormat.auto
    overlap: bool = True
    min_block_len: int = 256

    def __post_init__(self) -> None:
        if self.min_block_len < 1:
            raise InputError(f"method.min_block_len={self.min_block_len} must be at least 1")

    def settings(self) -> BlockSettings:
        return BlockSettings(
            anchor=self.anchor,
            layout=self.layout,
            wire=self.wire,
            overlap=self.overlap,
            min_block_len=self.min_block_len,
        )


class BlockMethod(AttentionMethod):
    """The attention that all blockwise methods share; they differ in their plan."""

    def __init__(self, settings: BlockSettings, compressor: Compressor | None = None) -> None:
        self._settings = settings
        self._compressor = compressor

    def attach(self, target: CompressorTarget) -> None:
        if self._compressor is not None:
            self._compressor.attach(target)

    def begin(self, context: PrefillContext) -> Attend:
        return _BlockPrefill(context, self._settings, self._compressor).attend

    def workload(self, plan: PrefillPlan, shape: ModelShape, rank: int) -> Workload:
        pairs = causal_pairs(plan.copied_anchor(rank)) + sum(
            causal_pairs(len(block), plan.upstream_len(block.index))
            for block in plan.layout.owned_by(rank)
        )
        received = plan.received_tokens(rank)
        return Workload(
            rows=plan.num_rows(rank),
            head_pairs=shape.num_heads * pairs,
            received=received * shape.kv_elements,
            element_bytes=self._settings.wire.element_bytes(shape.head_dim),
            messages=int(received > 0),
        )


class _BlockPrefill:
    """One prefill on one rank (APB, section 3 and algorithm 2)."""

    def __init__(
        self, context: PrefillContext, settings: BlockSettings, compressor: Compressor | None
    ) -> None:
        self._context = context
        self._overlap = settings.overlap
        self._compressor = compressor
        self._wire = settings.wire
        self._room = UpstreamRoom()
        self._exchanges: dict[tuple[int, ...], ContextExchange] = {}

    def attend(self, layer: LayerInputs) -> Tensor:
        """What can be sent is under way before local attention, and awaited after it.

        The passing block first: others wait for it, and NCCL sends one message after the other.
        """
        backend, local = self._context.backend, self._context.rows.local
        plan = self._context.plan.in_layer(layer.layer_idx)
        exchange = self._exchange(plan)
        with self._context.trace.span(Phase.COMPRESS, layer.layer_idx):
            message_NY = self._message(layer, exchange)
        pending = exchange.start(layer, message_NY)
        self._context.cache.write(layer.layer_idx, layer.k_KTD[:, local], layer.v_KTD[:, local])
        if not self._overlap:
            pending.wait()
        partial = backend.attend(layer.q_HTD, self._local_segments(layer), scale=layer.scale)
        upstream = exchange.upstream(layer, message_NY, pending)
        segments = self._upstream_segments(plan, *upstream)
        if segments:
            partial = backend.attend(layer.q_HTD, segments, scale=layer.scale, carry=partial)
        if self._context.auditor is not None:
            rows = self._context.rows
            self._context.auditor.observe(layer, rows, partial.out_THD, upstream[0])
        return partial.out_THD

    def _exchange(self, plan: PrefillPlan) -> ContextExchange:
        """That of all layers that pass on as much."""
        context, found = self._context, self._exchanges.get(plan.passing_lens)
        if found is None:
            found = self._exchanges[plan.passing_lens] = ContextExchange(
                plan,
                context.rows,
                context.comm,
                step=context.step,
                wire=self._wire,
                room=self._room,
            )
        return found

    def _message(self, layer: LayerInputs, exchange: ContextExchange) -> Tensor:
        """The anchor and what each of this rank's blocks passes on, in the order of the blocks."""
        plan = self._context.plan
        question_HWD = self._question(layer, exchange)
        outbox = exchange.outbox(layer)
        for (block, rows), out_P2KD in zip(self._context.rows.blocks, outbox.passing, strict=True):
            if len(out_P2KD) == 0:
                continue
            assert self._compressor is not None, "a plan with passing blocks needs a compressor"
            view = BlockView(
                layer.layer_idx,
                block.index,
                block.start,
                layer.q_HTD[:, rows],
                layer.k_KTD[:, rows],
                layer.v_KTD[:, rows],
                layer.scale,
                None if self._is_blind(block) else question_HWD,
            )
            self._compressor.select(
                view, out_P2KD, backend=self._context.backend, excluded=plan.excluded(block)
            )
        return exchange.message(layer, outbox)

    def _question(self, layer: LayerInputs, exchange: ContextExchange) -> Tensor | None:
        """The question's query vectors, or None where the compressor or the prompt goes without."""
        plan, compressor = self._context.plan, self._compressor
        if compressor is None or not compressor.needs_query or plan.anchor.query_len == 0:
            return None
        return exchange.question(layer)

    def _is_blind(self, block: Block) -> bool:
        """Whether the block selects without the question: the first one has no anchor (paper)."""
        return self._context.plan.anchor_form is AnchorForm.replicated and block.index == 0

    def _local_segments(self, layer: LayerInputs) -> list[Segment]:
        """The anchor's rows and each block's rows, causal over themselves."""
        rows = self._context.rows
        slices = [block_rows for _, block_rows in rows.blocks]
        if rows.anchor.stop <= rows.local.start:  # otherwise the anchor is the beginning of block 0
            slices.insert(0, rows.anchor)
        return [
            Segment(s.start, s.stop, layer.k_KTD[:, s], layer.v_KTD[:, s], causal=True)
            for s in slices
        ]

    def _upstream_segments(self, plan: PrefillPlan, k_KUD: Tensor, v_KUD: Tensor) -> list[Segment]:
        """Each block's rows, all of them seeing the anchor and the passing blocks before them."""
        segments = []
        for block, rows in self._context.rows.blocks:
            length = plan.upstream_len(block.index)
            if length:
                segments.append(
                    Segment(rows.start, rows.stop, k_KUD[:, :length], v_KUD[:, :length])
                )
        return segments
