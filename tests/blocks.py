"""Random blocks as compressors see them, and a model for compressors to meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apb.compress.base import BlockView, Compressor, CompressorTarget
from apb.compress.retaining_head import RetainingHeadCompressor
from apb.cost import ModelShape
from apb.plugins import PLUGINS
from apb.rotary import Rotary
from retaining_heads import random_heads

COMPRESSORS = tuple(PLUGINS["method/compressor"])
NUM_KV_HEADS, GROUPS, HEAD_DIM = 3, 2, 8
NUM_HEADS = NUM_KV_HEADS * GROUPS
QUERY_LEN = 4
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=NUM_HEADS * HEAD_DIM,
    intermediate_size=64,
    num_heads=NUM_HEADS,
    num_kv_heads=NUM_KV_HEADS,
    head_dim=HEAD_DIM,
    vocab_size=100,
)
TARGET = CompressorTarget(
    model="some",
    shape=SHAPE,
    hidden_act="silu",
    rotary=Rotary(torch.tensor([1.0, 0.3, 0.05, 0.01]), 1.1),
    device=torch.device("cpu"),
    dtype=torch.float32,
)


def build(name: str, *, seed: int = 0, **settings: object) -> Compressor:
    """A compressor that has met the model."""
    compressor: Compressor = PLUGINS["method/compressor"][name](**settings).build(seed=seed)
    if isinstance(compressor, RetainingHeadCompressor):
        compressor.use(random_heads(SHAPE, hidden_size=6), TARGET)
    else:
        compressor.attach(TARGET)
    return compressor


def draw_block(num_tokens: int, *, query_len: int = QUERY_LEN, start: int = 70) -> BlockView:
    return BlockView(
        layer_idx=2,
        block_idx=1,
        start=start,
        q_HSD=torch.randn(NUM_HEADS, num_tokens, HEAD_DIM),
        k_KSD=torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM),
        v_KSD=torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM),
        scale=0.4,
        query_HWD=torch.randn(NUM_HEADS, query_len, HEAD_DIM) if query_len else None,
    )


def changed(block: BlockView, change: Callable[[Tensor], Tensor]) -> BlockView:
    """The block with all its tensors changed in the same way."""
    return block._replace(
        q_HSD=change(block.q_HSD),
        k_KSD=change(block.k_KSD),
        v_KSD=change(block.v_KSD),
        query_HWD=None if block.query_HWD is None else change(block.query_HWD),
    )
