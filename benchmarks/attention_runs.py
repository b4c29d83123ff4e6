"""Timing of attention: alternating repeats on a CPU, events with a cold cache on a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, Segment
from apb.balance import causal_pairs
from benchmarks.attention_cases import Decode, Prefill, Scene, draw, segments_of

_GPU_REPEAT_MS = 300
_COPIED_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """One thing timed: seconds of each repeat, and what it did meanwhile."""

    kind: str
    """`plain`, `prefill`, `decode` or `copy`."""
    name: str
    case: str
    seconds: list[float]
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times functions side by side."""

    device: torch.device
    repeats: int

    def seconds(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Of each that runs here; the first run of each warms up."""
        runs = {name: run for name, run in runs.items() if _works(name, run)}
        if self.device.type == "cuda":
            return {name: self._on_gpu(run) for name, run in runs.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                found[name].append(time.perf_counter() - begin)
        return found

    def _on_gpu(self, run: Callable[[], object]) -> list[float]:
        from triton.testing import do_bench

        every: list[float] = do_bench(run, rep=_GPU_REPEAT_MS, return_mode="all")
        return [milliseconds / 1e3 for milliseconds in every]


def _works(name: str, run: Callable[[], object]) -> bool:
    try:
        run()
    except RuntimeError as error:  # as of cuDNN, for a dtype that it has no kernel for
        print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def run_plain(lengths: Sequence[int], scene: Scene, watch: Stopwatch) -> Iterator[Time]:
    """torch's own causal attention, by each of its fused kernels that runs here."""
    for length in lengths:
        q_HTD, [kv] = draw(scene, length, [length])
        runs = dict(_plain_runs(q_HTD, kv, causal=True))
        flops = scene.pair_flops * causal_pairs(length)
        for name, seconds in watch.seconds(runs).items():
            yield Time(
                kind="plain",
                name=name,
                case=f"causal {length}",
                seconds=seconds,
                flops=flops,
                bytes=0,
            )


def run_prefill(
    cases: Sequence[Prefill],
    contestants: Mapping[str, AttentionBackend],
    scene: Scene,
    watch: Stopwatch,
) -> Iterator[Time]:
    """Each backend on a block with upstream keys, and one plain call with as many pairs."""
    for case in cases:
        lengths = (case.local, case.anchor + case.received, case.pairs // case.local)
        q_HTD, [local, upstream, same_work] = draw(scene, case.local, lengths)
        segments = segments_of(case, local, upstream)
        runs = dict(_prefill_runs(contestants, q_HTD, *segments, scale=scene.scale))
        runs |= dict(_plain_runs(q_HTD, same_work, causal=False))
        if scene.device.type == "cpu":
            runs["ATen flash, per segment"] = partial(_in_turn, q_HTD, local, upstream)
        flops = scene.pair_flops * case.pairs
        for name, seconds in watch.seconds(runs).items():
            yield Time(
                kind="prefill",
                name=name,
                case=f"local {case.local}, anchor {case.anchor}, received {case.received}",
                seconds=seconds,
                flops=flops,
                bytes=0,
            )


def _prefill_runs(
    contestants: Mapping[str, AttentionBackend],
    q_HTD: Tensor,
    before: Sequence[Segment],
    after: Sequence[Segment],
    *,
    scale: float,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each backend in two calls, the second continuing the first; `fused` in one as well."""

    def attend(backend: AttentionBackend) -> None:
        carry = backend.attend(q_HTD, before, scale=scale)
        backend.attend(q_HTD, after, scale=scale, carry=carry)

    for name, backend in contestants.items():
        yield name, partial(attend, backend)
    if "fused" in contestants:
        both = [*before, *after]
        yield "fused, one launch", lambda: contestants["fused"].attend(q_HTD, both, scale=scale)


def _in_turn(q_HTD: Tensor, local: Tensor, upstream: Tensor) -> None:
    """The two calls that a backend cannot do without, not merged."""
    for kv, causal in ((local, True), (upstream, False)):
        for _, run in _plain_runs(q_HTD, kv, causal=causal):
            run()


def _plain_runs(
    q_HTD: Tensor, kv: Tensor, *, causal: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Plain attention by each of torch's fused kernels."""
    groups = q_HTD.shape[0] // kv.shape[1]
    if q_HTD.device.type == "cpu":
        q_KGTD = q_HTD.unflatten(0, (-1, groups))
        k_KGSD, v_KGSD = (x[:, None].expand(-1, groups, -1, -1) for x in kv)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        yield "ATen flash", lambda: flash(q_KGTD, k_KGSD, v_KGSD, 0.0, causal)
        return
    q_1HTD, k_1KSD, v_1KSD = q_HTD[None], kv[0][None], kv[1][None]
    yield (
        "ATen flash",
        lambda: torch.ops.aten._scaled_dot_product_flash_attention(
            q_1HTD, k_1KSD, v_1KSD, 0.0, causal, False
        ),
    )
    k_1HSD, v_1HSD = (x.repeat_interleave(groups, dim=1) for x in (k_1KSD, v_1KSD))
    yield (
        "cuDNN",
        lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_1HTD, k_1HSD, v_1HSD, None, True, 0.0, causal, False
        ),
    )


def run_decode(
    cases: Sequence[Decode],
    contestants: Mapping[str, AttentionBackend],
    scene: Scene,
    watch: Stopwatch,
) -> Iterator[Time]:
    """Few rows over a shard and themselves, and a copy, which is what the memory can do."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=scene.device)
    target = torch.empty_like(source)
    copied = watch.seconds({"copy": lambda: target.copy_(source)})["copy"]
    yield Time(
        kind="copy", name="copy", case="copy", seconds=copied, flops=0, bytes=2 * _COPIED_BYTES
    )
    for case in cases:
        q_HTD, [kv] = draw(scene, case.rows, (case.keys + case.rows,))
        rule_TT = torch.ones(case.rows, case.rows, dtype=torch.bool, device=scene.device).tril()
        visible_TE = rule_TT if case.rows > 1 else None  # as apb.methods.decode has it
        segments = [Segment(0, case.rows, kv[0], kv[1], visible_TE=visible_TE)]
        runs: dict[str, Callable[[], object]] = {
            name: partial(backend.attend, q_HTD, segments, scale=scene.scale)
            for name, backend in contestants.items()
        }
        for name, seconds in watch.seconds(runs).items():
            yield Time(
                kind="decode",
                name=name,
                case=f"{case.rows} rows, {case.keys} keys",
                seconds=seconds,
                flops=scene.pair_flops * case.rows * case.keys,
                bytes=kv.numel() * kv.element_size(),
            )
