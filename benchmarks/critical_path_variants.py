"""What `benchmarks.critical_path` compares: methods and their settings, and what they share."""

from __future__ import annotations

from dataclasses import dataclass

from apb.cost import CostModel, ModelShape, Rates
from apb.hf.model import DTYPES

SHAPES = {
    "llama3-8b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
    "smollm2-135m": ModelShape(
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
    ),
    "tiny": ModelShape(
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=384,
    ),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A method and its settings."""

    name: str
    title: str
    overrides: tuple[str, ...]
    alike: bool = False
    """All ranks do the same, so that the one with the most of it stands for all."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("apb", "shared anchor, balanced blocks", ("method=apb", "method.layout=balanced")),
        Variant(
            "apb-paper",
            "the paper's form: an anchor on every rank, even blocks",
            ("method=apb", "method.anchor=replicated", "method.layout=even"),
        ),
        Variant("apb-even", "shared anchor, even blocks", ("method=apb", "method.layout=even")),
        Variant("star", "Star Attention, as in its paper", ("method=star",)),
        Variant("ulysses", "DeepSpeed-Ulysses, exact", ("method=ulysses",), alike=True),
        Variant("ring", "ring attention, exact", ("method=ring",)),
        Variant("zigzag", "ring attention over zigzag blocks, exact", ("method=zigzag",)),
        Variant("full", "one rank, exact", ("method=full",)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What all variants have in common."""

    model: str
    """One of `SHAPES`."""
    layers: int
    """How many of them are run."""
    ranks: int
    question_len: int
    dtype: str
    device: str
    overrides: tuple[str, ...]
    rates: Rates

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.model]

    @property
    def costs(self) -> CostModel:
        itemsize = DTYPES[self.dtype].itemsize
        return CostModel(shape=self.shape, rates=self.rates, itemsize=itemsize)
