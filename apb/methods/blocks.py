"""Blockwise prefill: each block attends to the anchor, to earlier passing blocks and to itself.

`full` (one block), `star` (the first block as anchor, nothing passed) and `apb` are plans for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.comm import Pending
from apb.compress.base import BlockView, Compressor, PassingBlock
from apb.errors import InputError
from apb.layout import Block
from apb.methods.base import Attend, AttentionMethod, MethodConfig, PrefillContext
from apb.methods.exchange import ContextExchange
from apb.methods.plan import AnchorForm


@dataclass(kw_only=True, slots=True)
class BlockConfig(MethodConfig):
    """What the approximate blockwise methods have in common.

    Attributes:
        anchor: where the anchor runs.
        min_block_len: fewer blocks than ranks are used rather than shorter ones.
    """

    anchor: AnchorForm = MISSING
    min_block_len: int = 256

    def __post_init__(self) -> None:
        if self.min_block_len < 1:
            raise InputError(f"method.min_block_len={self.min_block_len} must be at least 1")


class BlockMethod(AttentionMethod):
    """The attention that all blockwise methods share; they differ in their plan."""

    def __init__(self, compressor: Compressor | None = None) -> None:
        self._compressor = compressor

    def begin(self, context: PrefillContext) -> Attend:
        return _BlockPrefill(context, self._compressor).attend


class _BlockPrefill:
    """One prefill on one rank (APB, section 3 and algorithm 2)."""

    def __init__(self, context: PrefillContext, compressor: Compressor | None) -> None:
        self._context = context
        self._compressor = compressor
        self._exchange = ContextExchange(
            context.plan, context.rows, context.comm, step=context.step
        )

    def attend(self, layer: LayerInputs) -> Tensor:
        """Everything that can be sent is under way before local attention, and awaited after it."""
        backend, local = self._context.backend, self._context.rows.local
        self._context.cache.write(layer.layer_idx, layer.k_KTD[:, local], layer.v_KTD[:, local])
        anchor_pending = self._exchange.start_anchor(layer)
        passing = list(self._select(layer, anchor_pending))
        passing_pending = self._exchange.start_passing(layer, passing)
        partial = backend.attend(layer.q_HTD, self._local_segments(layer), scale=layer.scale)
        anchor = self._exchange.finish_anchor(layer, anchor_pending)
        upstream = self._exchange.upstream(anchor, passing_pending)
        segments = self._upstream_segments(*upstream)
        if segments:
            partial = backend.attend(layer.q_HTD, segments, scale=layer.scale, carry=partial)
        return partial.out_THD

    def _select(self, layer: LayerInputs, anchor_pending: Pending | None) -> Iterator[PassingBlock]:
        """What each of this rank's blocks passes on, in the order of the blocks."""
        plan = self._context.plan
        for block, rows in self._context.rows.blocks:
            budget = plan.passing_lens[block.index] if plan.passing_lens else 0
            if budget == 0:
                yield PassingBlock(layer.k_KTD[:, :0], layer.v_KTD[:, :0])
                continue
            assert self._compressor is not None, "a plan with passing blocks needs a compressor"
            view = BlockView(
                layer.layer_idx,
                block.index,
                layer.q_HTD[:, rows],
                layer.k_KTD[:, rows],
                layer.v_KTD[:, rows],
                layer.scale,
                self._question(layer, block, anchor_pending),
            )
            yield self._compressor.select(view, budget=budget, excluded=plan.excluded(block))

    def _question(
        self, layer: LayerInputs, block: Block, anchor_pending: Pending | None
    ) -> Tensor | None:
        """The question's query vectors, or None where the compressor or the block goes without."""
        plan, compressor = self._context.plan, self._compressor
        if compressor is None or not compressor.needs_query or plan.anchor.query_len == 0:
            return None
        if plan.anchor_form is AnchorForm.replicated and block.index == 0:
            return None  # the first block has no anchor of its own (paper): it selects blindly
        return self._exchange.finish_anchor(layer, anchor_pending).query_HWD

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

    def _upstream_segments(self, k_KUD: Tensor, v_KUD: Tensor) -> list[Segment]:
        """Each block's rows, all of them seeing the anchor and the passing blocks before them."""
        segments = []
        for block, rows in self._context.rows.blocks:
            length = self._context.plan.upstream_len(block.index)
            if length:
                segments.append(
                    Segment(rows.start, rows.stop, k_KUD[:, :length], v_KUD[:, :length])
                )
        return segments
