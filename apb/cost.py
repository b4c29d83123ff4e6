"""What a prefill or a decoding step costs: work counted in integers, time predicted from rates.

FLOPs count a multiplication and an addition as two. Per layer, a row costs its linear layers, and a
query-key pair of one head ``4 * head_dim`` (score and weighted value).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

_FEMTO = 10**15


class ModelShape(NamedTuple):
    """The sizes of a decoder-only model with gated MLPs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_embeddings: int = 2
    """Of input and of output, or one for both."""

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer's linear maps: q, k, v, o, gate, up and down."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def activation_elements(self) -> int:
        """What one row of a layer reads and writes between the linear maps, kernel by kernel.

        Two norms in fp32 and two additions to the residual stream make 22 passes over it, RoPE 6
        over queries and keys, and the gated activation 5 over the MLP's inner width.
        """
        heads = (self.num_heads + self.num_kv_heads) * self.head_dim
        return 22 * self.hidden_size + 6 * heads + 5 * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Weights of the model; norms and biases are too few to count."""
        not_read = (self.num_embeddings - 1) * self.vocab_size * self.hidden_size
        return self.read_parameters + not_read

    @property
    def read_parameters(self) -> int:
        """Weights that a pass reads: of the input embedding only the rows of its tokens."""
        return self.num_layers * self.linear_parameters + self.vocab_size * self.hidden_size

    @property
    def kv_elements(self) -> int:
        """What one layer caches per token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one rank does per second, for one dtype."""

    linear_flops: float
    attention_flops: float
    memory_bytes: float
    """Weights and KV read while decoding."""
    link_bytes: float
    """From another rank."""
    latency_s: float
    """Of a small message between ranks."""
    source: str
    """Where the figures come from, for the user."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "source":
                continue
            least = 0.0 if field.name == "latency_s" else sys.float_info.min
            if not isinstance(value, int | float) or not least <= value < math.inf:
                raise ValueError(f"{field.name}={value!r} is no rate")


NOMINAL_CPU = Rates(
    linear_flops=6e10,
    attention_flops=6e10,
    memory_bytes=1e10,
    link_bytes=1e9,
    latency_s=8e-4,
    source="nominal figures of a CPU core; `python -m apb.calibrate` measures this machine",
)
NOMINAL_GPU = Rates(
    linear_flops=5e14,
    attention_flops=4e14,
    memory_bytes=3e12,
    link_bytes=1e11,
    latency_s=3e-5,
    source="nominal figures of an H100; `python -m apb.calibrate` measures this machine",
)


class Workload(NamedTuple):
    """One rank's work in one layer of a prefill."""

    rows: int
    """Tokens that run through the layer."""
    head_pairs: int
    """Query-key pairs, counted for every query head."""
    received: int = 0
    """Elements that arrive from other ranks."""
    messages: int = 0
    """Exchanges that have to be waited for one after the other."""
    overlaps: bool = True
    """Whether they run while attention does."""
    element_bytes: float | None = None
    """Of what arrives; None where it has the model's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Predicted seconds of a model on a machine."""

    shape: ModelShape
    rates: Rates
    itemsize: int
    """Bytes of an element of the dtype."""

    @property
    def row_cost(self) -> int:
        """Femtoseconds of one row in one layer: its linear maps, and what lies between them."""
        linear_s = 2 * self.shape.linear_parameters / self.rates.linear_flops
        between_s = self.shape.activation_elements * self.itemsize / self.rates.memory_bytes
        return max(1, round((linear_s + between_s) * _FEMTO))

    @property
    def pair_cost(self) -> int:
        """Femtoseconds of one query-key pair in all heads of one layer."""
        flops = 4 * self.shape.num_heads * self.shape.head_dim
        return max(1, round(flops / self.rates.attention_flops * _FEMTO))

    def token_wire_cost(self, element_bytes: float | None = None) -> int:
        """Femtoseconds to receive one token's keys and values of one layer."""
        num_bytes = self.shape.kv_elements * (element_bytes or self.itemsize)
        return round(num_bytes / self.rates.link_bytes * _FEMTO)

    def received_bytes(self, work: Workload) -> float:
        """Of one layer, as they travel."""
        return work.received * (work.element_bytes or self.itemsize)

    def layer_s(self, work: Workload) -> float:
        """One rank: linear maps and attention, and what attention cannot hide of the wire."""
        attention_s = 4 * self.shape.head_dim * work.head_pairs / self.rates.attention_flops
        wire_s = (
            self.received_bytes(work) / self.rates.link_bytes + work.messages * self.rates.latency_s
        )
        both_s = max(attention_s, wire_s) if work.overlaps else attention_s + wire_s
        return work.rows * self.row_cost / _FEMTO + both_s

    def prefill_s(self, works: Sequence[Workload]) -> float:
        """All layers on the slowest rank."""
        return self.shape.num_layers * max(map(self.layer_s, works))

    def kv_bytes(self, num_tokens: int) -> int:
        """The cache of that many tokens, all layers."""
        return num_tokens * self.shape.num_layers * self.shape.kv_elements * self.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.shape.num_parameters * self.itemsize

    def prefill_bytes(self, work: Workload, *, cached_tokens: int, chunk_len: int) -> int:
        """Predicted peak of one rank: weights, its share of the cache, one layer's activations.

        Activations peak where received segments are merged: hidden states and residual, q, k, v,
        the local result and two fp32 copies of it. MLPs run on `chunk_len` rows at once. What one
        exchange brings exists twice, as a message and unpacked.
        """
        shape, size = self.shape, self.itemsize
        heads = shape.num_heads * shape.head_dim
        row = (2 * shape.hidden_size + 2 * heads + shape.kv_elements) * size + 2 * heads * 4
        chunk = 3 * shape.intermediate_size * size * min(chunk_len, work.rows)
        arrived = math.ceil(self.received_bytes(work)) + work.received * size
        received = arrived // max(1, work.messages)
        return self.weight_bytes + self.kv_bytes(cached_tokens) + work.rows * row + chunk + received

    def step_s(self, shard_tokens: int, *, world_size: int) -> float:
        """One decoding step over a shard, with one gather per layer among several ranks."""
        weights = self.shape.read_parameters * self.itemsize
        read = weights + self.kv_bytes(shard_tokens)
        gathers = self.shape.num_layers if world_size > 1 else 0
        return read / self.rates.memory_bytes + gathers * self.rates.latency_s
