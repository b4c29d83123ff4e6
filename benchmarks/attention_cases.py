"""What attention is timed on, and the check that comes before.

Letters: T rows, S keys, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, AttentionTarget, Segment
from apb.attention.reference import ReferenceBackend
from apb.balance import causal_pairs
from apb.errors import ApbError, InputError
from apb.plugins import PLUGINS

_COMPETING = ("fused", "flash", "sdpa")


class Heads(NamedTuple):
    """Of the model."""

    query: int
    key: int
    dim: int

    @property
    def name(self) -> str:
        return f"h{self.query}k{self.key}d{self.dim}"


class Scene(NamedTuple):
    """What is the same for everything that is timed."""

    heads: Heads
    device: torch.device
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return float(self.heads.dim**-0.5)

    @property
    def pair_flops(self) -> int:
        """Of a query-key pair in all heads."""
        return 4 * self.heads.query * self.heads.dim


class Prefill(NamedTuple):
    """A block of rows that sees an anchor, received passing blocks and itself."""

    local: int
    anchor: int
    received: int

    @property
    def pairs(self) -> int:
        return causal_pairs(self.local, self.anchor + self.received)


class Decode(NamedTuple):
    """A few rows that see a shard."""

    rows: int
    keys: int


def plain_cases(*, small: bool) -> list[int]:
    """Lengths of plain causal attention."""
    return [2048, 4096] if small else [16384, 32768]


def prefill_cases(*, small: bool) -> list[Prefill]:
    """The paper's 128K setting on 8 ranks: local 16K, anchor 4K, passing blocks of 2K."""
    scale = 8 if small else 1
    received = (2048, 8192, 14336)
    return [Prefill(16384 // scale, 4096 // scale, length // scale) for length in received]


def decode_cases(*, small: bool) -> list[Decode]:
    keys = (4096, 16384) if small else (16384, 32768, 131072)
    return [Decode(rows, length) for length in keys for rows in (1, 8, 60)]


def backends(scene: Scene) -> Mapping[str, AttentionBackend]:
    """Those that can run here."""
    target = AttentionTarget(scene.device, scene.dtype, scene.heads.dim)
    found = {}
    for name in _COMPETING:
        try:
            found[name] = PLUGINS["backend"][name]().build(target)
        except InputError:
            continue
    return found


def draw(scene: Scene, rows: int, keys: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Queries, and for each number of keys a buffer of keys and values ``[2, K, S, D]``."""
    heads, device, dtype = scene
    q_HTD = torch.randn(heads.query, rows, heads.dim, device=device, dtype=dtype)
    kv = [
        torch.randn(2, heads.key, length, heads.dim, device=device, dtype=dtype) for length in keys
    ]
    return q_HTD, kv


def segments_of(case: Prefill, local: Tensor, upstream: Tensor) -> tuple[list[Segment], ...]:
    """What runs while the exchange does, and what comes after it."""
    before = [Segment(0, case.local, local[0], local[1], causal=True)]
    return before, [Segment(0, case.local, upstream[0], upstream[1])]


def check_backends(contestants: Mapping[str, AttentionBackend], scene: Scene) -> Iterator[str]:
    """Compare every backend with fp64 at lengths that fit no tile; a sentence for each.

    Raises:
        ApbError: one is further from fp64 than eight units of the dtype.
    """
    case = Prefill(local=333, anchor=77, received=130)
    upstream_len = case.anchor + case.received
    q_HTD, kv = draw(scene, case.local, (case.local, upstream_len))
    before, after = segments_of(case, *kv)
    exact = ReferenceBackend().attend(
        q_HTD.double(),
        [
            Segment(s.start, s.stop, s.k_KSD.double(), s.v_KSD.double(), s.causal)
            for s in (*before, *after)
        ],
        scale=scene.scale,
    )
    limit = 8 * torch.finfo(scene.dtype).eps
    for name, backend in contestants.items():
        carry = backend.attend(q_HTD, before, scale=scene.scale)
        found = backend.attend(q_HTD, after, scale=scene.scale, carry=carry)
        error = float((found.out_THD.double() - exact.out_THD).abs().max())
        if not error <= limit:
            raise ApbError(f"{name} is {error:.1e} from fp64, more than {limit:.1e}")
        yield f"{name}: {error:.1e} from fp64 at most (limit {limit:.1e})"
