"""APB: anchor, passing blocks and local attention (Huang et al., ACL 2025, arXiv 2502.12085)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from apb.compress.base import Compressor, CompressorConfig
from apb.errors import InputError
from apb.layout import LayoutPolicy, SequenceLayout
from apb.methods.balanced import balanced
from apb.methods.base import AttentionMethod
from apb.methods.blocks import BlockConfig, BlockMethod, BlockSettings
from apb.methods.budgets import LayerBudgets, UniformBudgets, layer_budgets, spread
from apb.methods.plan import Anchor, AnchorForm, PlanRequest, PrefillPlan, cut_context

Length = int | float
"""A length in tokens (an integer) or as a share of an even block's length (a float in [0, 1])."""


class ApbMethod(BlockMethod):
    """Approximate: each block sees the anchor, what earlier blocks selected, and itself."""

    def __init__(
        self,
        compressor: Compressor,
        *,
        anchor_len: Length,
        passing_len: Length,
        layer_budgets: LayerBudgets,
        settings: BlockSettings,
    ) -> None:
        super().__init__(settings, compressor)
        self._layer_budgets = layer_budgets
        self._anchor_len, self._passing_len = anchor_len, passing_len

    def plan(self, request: PlanRequest) -> PrefillPlan:
        """Anchor and passing lengths follow from even blocks, whatever the policy makes of them.

        Where even blocks pass on all they have, longer ones would not: they stay even.
        """
        layout, notes = cut_context(
            request, self._settings.layout, min_block_len=self._settings.min_block_len
        )
        if len(layout.blocks) == 1:
            return PrefillPlan(layout, passing_lens=(0,), notes=notes)
        anchor = self._anchor(layout, request.prefix_len, request.query_len)
        if anchor.query_len < request.query_len and len(anchor):
            notes += (
                f"the anchor shows the last {anchor.query_len} of {request.query_len} query "
                f"tokens: half of its {len(anchor)} tokens (method.anchor_len)",
            )
        passing_lens = self._passing_lens(layout, anchor)
        plan = PrefillPlan(
            layout,
            anchor,
            self._settings.anchor,
            passing_lens,
            self._layer_passing_lens(layout, anchor, passing_lens, request.costs.shape.num_layers),
            notes=notes,
        )
        if self._settings.layout is LayoutPolicy.balanced and not plan.passes_everything:
            return balanced(plan, request.costs, self._settings.wire)
        return plan

    def _anchor(self, layout: SequenceLayout, prefix_len: int, query_len: int) -> Anchor:
        """The anchor's context tokens lie inside block 0, so that no row sees a token twice."""
        first_len = len(layout.blocks[0])
        length = _in_tokens(self._anchor_len, layout.max_block_len)
        spliced = min(query_len, length // 2)
        shown = length - spliced
        if shown > first_len:
            if isinstance(self._anchor_len, int):
                raise InputError(
                    f"method.anchor_len={length} shows {shown} context tokens but the first block "
                    f"has {first_len}: lower method.anchor_len to "
                    f"{first_len + spliced} or lower num_blocks"
                )
            shown = first_len
        return Anchor(shown, spliced, min(prefix_len, shown))

    def _layer_passing_lens(
        self,
        layout: SequenceLayout,
        anchor: Anchor,
        passing_lens: Sequence[int],
        num_layers: int,
    ) -> tuple[tuple[int, ...], ...]:
        """Per layer and block, with the same sum as `passing_lens` in every layer."""
        if isinstance(self._layer_budgets, UniformBudgets):
            return ()
        weights = self._layer_budgets.weights(num_layers)
        available = (*_selectable(layout, anchor), 0)
        per_block = [
            spread(length, weights, most)
            for length, most in zip(passing_lens, available, strict=True)
        ]
        return tuple(zip(*per_block, strict=True))

    def _passing_lens(self, layout: SequenceLayout, anchor: Anchor) -> tuple[int, ...]:
        """As many tokens as asked for or as the block can give; nobody reads the last block's."""
        length = _in_tokens(self._passing_len, layout.max_block_len)
        if isinstance(self._passing_len, int) and length > layout.max_block_len:
            raise InputError(
                f"method.passing_len={length} exceeds the block length of {layout.max_block_len} "
                "tokens: lower method.passing_len or num_blocks"
            )
        return (*(min(length, available) for available in _selectable(layout, anchor)), 0)


@dataclass(kw_only=True, slots=True)
class ApbConfig(BlockConfig):
    """Config of `ApbMethod`.

    Attributes:
        compressor: chooses the passing KV.
        layout: `balanced` (block lengths by the cost model), `even` (paper) or `zigzag`.
        anchor: `shared` (rank 0 runs the anchor once) or `replicated` (paper).
        anchor_len: tokens (integer) or share of an even block (float); the paper's is 1/4.
        passing_len: per block, likewise; the paper's is 1/8.
        layer_budgets: how that is spread over layers: `uniform` (paper), `pyramid`, or a result
            with an audit, after which layers that lost more pass on more.
    """

    compressor: CompressorConfig = MISSING
    layout: LayoutPolicy = LayoutPolicy.balanced
    anchor: AnchorForm = AnchorForm.shared
    anchor_len: Length = 0.25
    passing_len: Length = 0.125
    layer_budgets: str = "uniform"

    def __post_init__(self) -> None:
        BlockConfig.__post_init__(self)  # super() does not work in a class with slots before 3.14
        for name in ("anchor_len", "passing_len"):
            value = getattr(self, name)
            if not value >= 0 or (isinstance(value, float) and value > 1):  # so is NaN
                raise InputError(
                    f"method.{name}={value} must be a number of tokens (an integer from 0) "
                    "or a share of the block length (a decimal from 0.0 to 1.0)"
                )

    def build(self, *, seed: int) -> AttentionMethod:
        return self.build_apb(seed=seed)

    def build_apb(self, *, seed: int) -> ApbMethod:
        return ApbMethod(
            self.compressor.build(seed=seed),
            anchor_len=self.anchor_len,
            passing_len=self.passing_len,
            layer_budgets=layer_budgets(self.layer_budgets),
            settings=self.settings(),
        )


def _selectable(layout: SequenceLayout, anchor: Anchor) -> list[int]:
    """How many tokens each block but the last can pass on: those that the anchor does not show."""
    return [
        len(block) - (anchor.context_len if block.index == 0 else 0) for block in layout.blocks[:-1]
    ]


def _in_tokens(length: Length, block_len: int) -> int:
    return length if isinstance(length, int) else int(length * block_len)
