"""What one rank of this machine computes and reads per second, with the kernels that a run uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import Segment
from apb.attention.sdpa import SdpaBackend
from apb.hf.linear import WideLinears

_PROBE_ROWS = 128
_FEWEST_REPEATS, _MOST_REPEATS = 3, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The work that is timed: large enough for full speed, cut where it would take too long."""

    rows: int
    """At most; fewer on a machine on which a call would exceed its share of `budget_s`."""
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: int
    weight_bytes: int
    """Read by each repeat of the matrix-vector products: more than any cache holds."""
    budget_s: float
    """Of each rate, about."""

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        if device.type == "cuda":
            return cls(
                rows=8192,
                hidden=4096,
                intermediate=14336,
                heads=32,
                kv_heads=8,
                head_dim=128,
                keys=8192,
                weight_bytes=2**31,
                budget_s=1.0,
            )
        return cls(
            rows=2048,
            hidden=2048,
            intermediate=5632,
            heads=8,
            kv_heads=2,
            head_dim=128,
            keys=4096,
            weight_bytes=2**28,
            budget_s=1.5,
        )


class RankBench:
    """Measures one device in one dtype; on the CPU with the threads that torch has now."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self._device, self._dtype, self._sizes = device, dtype, sizes

    @torch.inference_mode()
    def linear_flops(self) -> float:
        """FLOP/s of a prefill's linear layers."""
        sizes = self._sizes
        weight = self._random(sizes.intermediate, sizes.hidden)
        x_TM = self._random(sizes.rows, sizes.hidden)
        with WideLinears() if WideLinears.suit(self._device) else nullcontext():
            rows, seconds = self._timed_rows(
                lambda rows: torch.nn.functional.linear(x_TM[:rows], weight)
            )
        return 2 * rows * weight.numel() / seconds

    @torch.inference_mode()
    def attention_flops(self) -> float:
        """FLOP/s of rows over keys that all of them see."""
        sizes, backend = self._sizes, SdpaBackend()
        q_HTD = self._random(sizes.heads, sizes.rows, sizes.head_dim)
        k_KSD, v_KSD = self._random(2, sizes.kv_heads, sizes.keys, sizes.head_dim)
        rows, seconds = self._timed_rows(
            lambda rows: backend.attend(
                q_HTD[:, :rows], [Segment(0, rows, k_KSD, v_KSD)], scale=sizes.head_dim**-0.5
            )
        )
        return 4 * sizes.head_dim * sizes.heads * rows * sizes.keys / seconds

    @torch.inference_mode()
    def memory_bytes(self) -> float:
        """Bytes per second of a decoding step's weights: matrix-vector products."""
        first = self._random(self._sizes.intermediate, self._sizes.hidden)
        first_bytes = first.numel() * first.element_size()
        copies = -(-self._sizes.weight_bytes // first_bytes) - 1
        weights = [first, *(first.clone() for _ in range(copies))]
        x_1M = self._random(1, self._sizes.hidden)

        def step() -> None:
            for weight in weights:
                torch.nn.functional.linear(x_1M, weight)

        self._seconds(step)
        return len(weights) * first_bytes / self._median(step)

    def _random(self, *shape: int) -> Tensor:
        """Not zeros: a GPU that multiplies zeros draws less power and clocks higher."""
        return torch.randn(shape, device=self._device).to(self._dtype)

    def _timed_rows(self, run: Callable[[int], object]) -> tuple[int, float]:
        """How many rows were run at once, and the median of the seconds that they took."""
        probe = min(_PROBE_ROWS, self._sizes.rows)
        self._seconds(lambda: run(probe))
        row_s = self._seconds(lambda: run(probe)) / probe
        affordable = int(self._sizes.budget_s / (_FEWEST_REPEATS + 1) / row_s)
        rows = max(probe, min(self._sizes.rows, affordable))
        self._seconds(lambda: run(rows))
        return rows, self._median(lambda: run(rows))

    def _median(self, run: Callable[[], object]) -> float:
        """Of repeats until the budget is spent."""
        seconds: list[float] = []
        while len(seconds) < _FEWEST_REPEATS or (
            len(seconds) < _MOST_REPEATS and sum(seconds) < self._sizes.budget_s
        ):
            seconds.append(self._seconds(run))
        return statistics.median(seconds)

    def _seconds(self, run: Callable[[], object]) -> float:
        begin = self._now()
        run()
        return self._now() - begin

    def _now(self) -> float:
        """The time once the device has finished what was asked of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
