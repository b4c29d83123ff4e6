"""What a rank's memory should hold, and what it held."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedConfig

_SETTLE_S = 0.5


def resident_bytes(pid: int | str) -> int:
    """The resident set of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def settled_children(count: int) -> list[int]:
    """Resident sets of the `count` processes that this one has started, in order, at rest."""
    before: list[int] = []
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        after = [resident_bytes(pid) for pid in children]
        assert len(after) == count, f"{len(after)} processes where {count} were started"
        if after == before:
            return after
        before = after
        time.sleep(_SETTLE_S)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes per token that a prefill cannot do without, from the model's shape."""

    kv: int
    """Keys and values of all layers."""
    activations: int
    """One layer's: hidden, residual, q, k, v, attention out, and the MLP's gate, up, product."""

    FORMULA: ClassVar[str] = (
        "2 hidden + 2 heads * head_dim + 2 kv_heads * head_dim + 3 intermediate, in the dtype"
    )

    @classmethod
    def of(cls, config: PreTrainedConfig, itemsize: int) -> Sizes:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv = 2 * config.num_hidden_layers * kv_heads * head_dim
        layer = (
            2 * config.hidden_size
            + 2 * heads * head_dim
            + 2 * kv_heads * head_dim
            + 3 * config.intermediate_size
        )
        return cls(kv * itemsize, layer * itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """One rank's peak beside its parts, in bytes."""

    peak: int
    baseline: int
    """Resident before any weight was read: interpreter and libraries."""
    weights: int
    kv: int
    activations: int

    @property
    def needed(self) -> int:
        return self.weights + self.kv + self.activations

    @property
    def excess(self) -> float:
        """What the peak has beyond baseline and need, as a share of the need."""
        return (self.peak - self.baseline) / self.needed - 1
